"""Local certificates: which reduced network or compiled plan may run on this machine, and what proves it.

`dints-deploy export` measures a network on this machine and leaves in `$DINTS_STATE/engines`:
    <digest>.onnx or .plan      what runs, named by its SHA-256 (none where the entry's own ONNX runs)
    <weights>-<engine>-<precision>-<device>.json      the certificate, sealed
    seal.key                    this machine's secret, 0600
The seal is an HMAC over the certificate's content: one changed by hand, or brought from elsewhere, is refused.
A plan can execute code when it is loaded, so it comes only from this folder, and only while its owner alone may write.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from dints_deploy.catalog.strict import Strict, read_json
from dints_deploy.errors import EngineError
from dints_deploy.files import make_private_folder, output_error, state_folder, sync_folder, write_bytes, write_text
from dints_deploy.runtime.parity import Comparison

SECRET_FILE: Final = "seal.key"
SECRET_BYTES: Final = 32
SUFFIXES: Final = {"tensorrt": "plan"}
"""Engine -> suffix of what it runs; ONNX where it is not named."""


class Target(Strict):
    """What to run a network on: one engine, precision and device."""

    engine: str
    precision: str
    device: str

    def __str__(self) -> str:
        return f"{self.engine} at {self.precision} on {self.device}"


class LocalCertificate(Strict):
    """What was measured at export, and for exactly what it counts.

    Attributes:
        entry, member: where the weights come from, for people.
        comparison: against the reference; `onnx_sha256` is that of the entry's fp32 ONNX.
        reference: what the comparison was made against.
        kept: the limits that were kept.
        machine: the device as `describe_device` says it.
        artefact_sha256: of the network or plan that runs; None where it is the entry's own ONNX.
        dice_change: label id -> change of the mean Dice against the readers' labels; None without --data.
        cases: how many labelled cases that was measured on.
        seconds_per_window, fp32_seconds_per_window: best of a few, and the same for the fp32 network beside it.
        software, made: version and time (ISO 8601).
        seal: HMAC-SHA256 over everything else.
    """

    schema_version: Literal[2]
    entry: str
    member: str
    comparison: Comparison
    reference: str
    kept: dict[str, float]
    machine: str
    artefact_sha256: str | None
    dice_change: dict[str, float | None] | None
    cases: int
    seconds_per_window: float
    fp32_seconds_per_window: float
    software: str
    made: str
    seal: str = ""

    @property
    def target(self) -> Target:
        """Return what it counts for."""
        shown = self.comparison
        return Target(engine=shown.engine, precision=shown.precision, device=shown.device)


def engines_folder() -> Path:
    """Return where networks, plans and certificates of this machine lie."""
    return state_folder() / "engines"


def certificate_path(onnx_sha256: str, target: Target) -> Path:
    """Return where the certificate for these weights on this target lies."""
    device = target.device.replace(":", "")
    return engines_folder() / f"{onnx_sha256[:24]}-{target.engine}-{target.precision}-{device}.json"


def artefact_path(certificate: LocalCertificate) -> Path | None:
    """Return where the network or plan lies; None where the entry's own ONNX runs."""
    if certificate.artefact_sha256 is None:
        return None
    return engines_folder() / f"{certificate.artefact_sha256}.{SUFFIXES.get(certificate.comparison.engine, 'onnx')}"


def install(certificate: LocalCertificate, artefact: bytes | None) -> Path:
    """Write a network or plan and its sealed certificate; return the certificate's path.

    The network is durable before the certificate that names it; what an older certificate named goes last. An
    interruption leaves the old pair or the new one, and at worst a file that nobody names.

    Raises:
        OutputError: `disk-full` or `output-unwritable`. EngineError: `state-permissions`.
    """
    make_private_folder(state_folder())
    make_private_folder(engines_folder())
    path = certificate_path(certificate.comparison.onnx_sha256, certificate.target)
    before = _named_by(path)
    digest = None if artefact is None else hashlib.sha256(artefact).hexdigest()
    certificate = certificate.model_copy(update={"artefact_sha256": digest})
    if artefact is not None and (target := artefact_path(certificate)) is not None:
        write_bytes(target, artefact)
        target.chmod(0o600)
    sealed = certificate.model_copy(update={"seal": _seal(certificate, _secret(create=True))})
    write_text(path, sealed.model_dump_json(indent=1) + "\n")
    path.chmod(0o600)
    if before is not None and before != artefact_path(certificate) and not _still_named(before):
        with suppress(OSError):
            before.unlink()
    return path


def read_certificate(path: Path) -> LocalCertificate:
    """Read a certificate and check its owner, its form and its seal.

    Raises:
        EngineError: `state-permissions` or `certificate-invalid`.
    """
    for place in (state_folder(), engines_folder(), path):
        check_owner(place, forbidden=0o022)
    certificate = read_json(path, LocalCertificate, EngineError, "certificate-invalid")
    if not hmac.compare_digest(certificate.seal, _seal(certificate, _secret(create=False))):
        raise EngineError(
            "certificate-invalid",
            f"expected {path.name} as export wrote it, found its seal broken: export {certificate.entry} again",
        )
    return certificate


def read_artefact(certificate: LocalCertificate) -> bytes | None:
    """Return the network or plan that a certificate names, whole; None where the entry's own ONNX runs.

    Raises:
        EngineError: `artefact-damaged` or `state-permissions`.
    """
    path = artefact_path(certificate)
    if path is None:
        return None
    again = f"export {certificate.entry} again"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EngineError(
            "artefact-damaged", f"expected to read {path.name}, found: {error.strerror}: {again}"
        ) from error
    check_owner(path, forbidden=0o022)
    if hashlib.sha256(data).hexdigest() != certificate.artefact_sha256:
        raise EngineError(
            "artefact-damaged", f"expected {path.name} as export wrote it, found {len(data)} other bytes: {again}"
        )
    return data


def installed_certificates() -> list[Path]:
    """Return the paths of all certificates of this machine."""
    return sorted(engines_folder().glob("*.json"))


def check_owner(path: Path, *, forbidden: int) -> None:
    """Refuse what another user owns or may change, and links.

    Args:
        path: of a file or folder.
        forbidden: permission bits that must not be set.

    Raises:
        EngineError: `state-permissions`.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) and path != state_folder():
        raise EngineError("state-permissions", f"expected a plain file or folder, found a link: {path}: remove it")
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise EngineError("state-permissions", f"expected {path} to be yours, found owner {status.st_uid}: chown it")
    if status.st_mode & forbidden:
        mode = stat.S_IMODE(status.st_mode)
        raise EngineError("state-permissions", f"expected {path} closed to others, found mode {mode:o}: chmod go= it")


def _named_by(path: Path) -> Path | None:
    """Return what a certificate that is about to be replaced names, if it can be read."""
    if not path.exists():
        return None
    try:
        return artefact_path(read_certificate(path))
    except EngineError:
        return None


def _still_named(artefact: Path) -> bool:
    """Say whether any certificate names a file; one network can serve two engines."""
    return any(_named_by(path) == artefact for path in installed_certificates())


def _seal(certificate: LocalCertificate, secret: bytes) -> str:
    content = certificate.model_dump_json(exclude={"seal"})
    return hmac.new(secret, content.encode(), hashlib.sha256).hexdigest()


def _secret(*, create: bool) -> bytes:
    """Return this machine's secret; make it where there is none yet.

    Raises:
        EngineError: `certificate-invalid` when it is gone or damaged, `state-permissions`. OutputError: it cannot be
            written.
    """
    path = engines_folder() / SECRET_FILE
    if create and not path.exists():
        _write_secret(path)
    try:
        check_owner(path, forbidden=0o077)
        secret = path.read_bytes()
    except OSError as error:
        raise EngineError(
            "certificate-invalid", f"expected this machine's key {path}, found: {error.strerror}: export again"
        ) from error
    if len(secret) != SECRET_BYTES:
        raise EngineError(
            "certificate-invalid", f"expected {SECRET_BYTES} bytes in {path}, found {len(secret)}: remove it"
        )
    return secret


def _write_secret(path: Path) -> None:
    """Write a new secret that was never readable by others; leave it to whoever was first."""
    partial = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
