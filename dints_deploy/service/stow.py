"""Send DICOM objects to a DICOMweb server (STOW-RS, PS3.18 10.5)."""

from __future__ import annotations

import json
import secrets
import shutil
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from urllib3 import BaseHTTPResponse, PoolManager, Timeout
from urllib3.exceptions import HTTPError, NewConnectionError, SSLError
from urllib3.exceptions import TimeoutError as SlowError

from dints_deploy.dicom.instance import identify
from dints_deploy.dicom.network import DUPLICATE
from dints_deploy.errors import DeliveryError

SPOOLED_BYTES: Final = 16 << 20
"""Bodies larger than this are built in a file."""

ANSWER_BYTES: Final = 4 << 20
"""Most of an answer that is read."""

FAILED_SOP_SEQUENCE, FAILURE_REASON, REFERENCED_SOP_INSTANCE_UID = "00081198", "00081197", "00081155"
RETRYABLE: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 507})


@dataclass(frozen=True)
class Service:
    """A DICOMweb server.

    Attributes:
        url: of the service; "/studies" is added.
        token: sent as `Authorization: Bearer`.
        tls: how https is checked; None for the system's authorities.
    """

    url: str
    token: str | None = None
    timeout_seconds: float = 30.0
    tls: ssl.SSLContext | None = None


def send(service: Service, paths: Sequence[Path]) -> tuple[str, ...]:
    """Store files in one request; no redirect is followed, and no proxy of the environment used.

    Returns:
        The instances that are stored there.

    Raises:
        DeliveryError: `delivery-unreachable`, `delivery-tls`, `delivery-timeout`, `delivery-aborted`,
            `delivery-rejected` (not authorised, redirected), `delivery-refused`, `delivery-unsupported`.
        ScanRefused: a file is no DICOM object.
    """
    instances = tuple(identify(path).SOPInstanceUID for path in paths)
    boundary = secrets.token_hex(16)
    headers = {
        "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
        "Accept": "application/dicom+json",
    }
    if service.token is not None:
        headers["Authorization"] = f"Bearer {service.token}"
    with tempfile.SpooledTemporaryFile(SPOOLED_BYTES) as body:
        headers["Content-Length"] = str(_write_body(body, paths, boundary))
        status, answer = _post(service, body, headers)
    _judge(status, answer, instances)
    return instances


def _write_body(body: IO[bytes], paths: Sequence[Path], boundary: str) -> int:
    """Write the parts (RFC 2387) and return their length."""
    for path in paths:
        body.write(f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode())
        with path.open("rb") as file:
            shutil.copyfileobj(file, body)
        body.write(b"\r\n")
    body.write(f"--{boundary}--\r\n".encode())
    length = body.tell()
    body.seek(0)
    return length


def _post(service: Service, body: IO[bytes], headers: dict[str, str]) -> tuple[int, bytes]:
    timeout = Timeout(connect=service.timeout_seconds, read=service.timeout_seconds)
    try:
        with PoolManager(timeout=timeout, retries=False, ssl_context=service.tls) as pool:
            response = pool.request(
                "POST", f"{service.url.rstrip('/')}/studies", body=body, headers=headers, redirect=False,
                preload_content=False,
            )  # fmt: skip
            return response.status, _bounded(response)
    except SSLError as error:
        raise _failed("delivery-tls", f"a TLS error ({_reason(error)}): check the certificates") from error
    except NewConnectionError as error:  # before the time-out of which it is a kind
        raise _failed("delivery-unreachable", "no connection: check that it runs and the network between") from error
    except SlowError as error:
        raise _failed("delivery-timeout", f"none within {service.timeout_seconds:g} s: try later") from error
    except (HTTPError, OSError) as error:
        raise _failed("delivery-aborted", f"the connection broken ({type(error).__name__}): look at its log") from error


def _bounded(response: BaseHTTPResponse) -> bytes:
    try:
        return response.read(ANSWER_BYTES)
    finally:
        response.close()


def _reason(error: SSLError) -> str:
    cause = error.args[0] if error.args else error
    return str(getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or type(cause).__name__)


def _failed(code: str, found: str, *, retryable: bool = True) -> DeliveryError:
    return DeliveryError(code, f"expected an answer of the DICOMweb server, found {found}", retryable=retryable)


def _judge(status: int, answer: bytes, instances: tuple[str, ...]) -> None:
    """Raise what the server's answer means, unless every instance is stored (PS3.18 10.5.3)."""
    if 300 <= status < 400:
        raise _failed("delivery-rejected", "a redirect, which is not followed: name the final url", retryable=False)
    if status in (401, 403):
        raise _failed("delivery-rejected", f"status {status}: check the token", retryable=True)
    failures = _failures(answer)
    if status in (200, 202, 409):
        failed = [uid for uid, reason in failures.items() if reason != DUPLICATE]
        if not failed and (status == 200 or failures):
            return
        reasons = ", ".join(sorted({f"0x{failures[uid]:04X}" for uid in failed})) or "no list of instances"
        found = f"{len(failed) or len(instances)} of {len(instances)} objects not stored ({reasons}): look at its log"
        raise _failed("delivery-refused", found, retryable=any(failures[uid] >> 8 == 0xA7 for uid in failed))
    code = "delivery-unsupported" if status in (406, 415) else "delivery-refused"
    raise _failed(code, f"status {status}: look at its log", retryable=status in RETRYABLE)


def _failures(answer: bytes) -> dict[str, int]:
    """Return the instances that were not stored, and the reasons; none where the answer is not DICOM JSON."""
    try:
        document: Any = json.loads(answer)
        items = document[FAILED_SOP_SEQUENCE]["Value"]
        return {
            str(item[REFERENCED_SOP_INSTANCE_UID]["Value"][0]): int(item[FAILURE_REASON]["Value"][0]) for item in items
        }
    except (ValueError, LookupError, TypeError):
        return {}
