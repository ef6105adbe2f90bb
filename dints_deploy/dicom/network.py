"""Call other DICOM nodes: send stored files as they are, ask for storage commitment, count a study's instances."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom import AE, _config, evt
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import StorageCommitmentPushModel, StudyRootQueryRetrieveInformationModelFind, Verification
from pynetdicom.transport import AddressInformation, AssociationSocket

from dints_deploy.dicom.header import NATIVE
from dints_deploy.dicom.instance import Instance, identify
from dints_deploy.dicom.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dints_deploy.dicom.uid import derived_uid
from dints_deploy.errors import DeliveryError

COMMITMENT_INSTANCE: Final = "1.2.840.10008.1.20.1.1"
"""The well-known instance of the Storage Commitment Push Model (PS3.4 J.3.5)."""

REQUEST_COMMITMENT: Final = 1
"""Action type of N-ACTION (PS3.4 J.3.2)."""

DUPLICATE: Final = 0x0111
"""The instance is there already (PS3.7 C). Our UIDs follow from content, so it is the same one."""

HELD_SECONDS: Final = 0.05
"""Between two looks at whether the reading thread still lives."""

PENDING: Final = (0xFF00, 0xFF01)
OUT_OF_RESOURCES: Final = 0xA7
PROCESSING_FAILURE: Final = 0x0110
NOT_RECOGNISED: Final = {3: "our AE title is not known there", 7: "its AE title is another"}
"""Diagnostics of a rejection by the service user (PS3.8 9.3.4)."""


@dataclass(frozen=True)
class Remote:
    """A node to call.

    Attributes:
        timeout_seconds: for the connection, and for each answer.
        tls: speaks TLS where given; the certificate must be for `host`.
    """

    host: str
    port: int
    ae_title: str
    calling_ae_title: str
    timeout_seconds: float = 30.0
    tls: ssl.SSLContext | None = None


class Commitments:
    """Reports of storage commitment that are waited for, from whatever association they come."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reports: dict[str, frozenset[str] | None] = {}

    def expect(self, transaction: str) -> None:
        """Begin to keep reports of a transaction; others are dropped."""
        with self._changed:
            self._reports[transaction] = None

    def report(self, transaction: str, instances: frozenset[str]) -> None:
        """Take a report: the instances that are safe."""
        with self._changed:
            if transaction in self._reports:
                self._reports[transaction] = (self._reports[transaction] or frozenset()) | instances
                self._changed.notify_all()

    def wait(self, transaction: str, *, seconds: float) -> frozenset[str] | None:
        """Return the instances that are reported safe, None where no report comes in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._reports.get(transaction) is not None, timeout=seconds)
            return self._reports.pop(transaction, None)


class ClosingSocket(AssociationSocket):  # type: ignore[misc]  # the library has no types
    """Closes its connection whatever the other side did; the library leaves it open where that was quicker."""

    def _shutdown_socket(self) -> None:
        connection = self.socket
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


class Gate:
    """Holds the library's reading thread while we wait for an answer ourselves, in the place of its plain event.

    With the plain one a thread that was just let through may still take the next answer off the queue, and the call
    that waits for it ends without. Here `clear` returns only once the thread stands at the gate, or is gone.
    """

    def __init__(self, reader: threading.Thread) -> None:
        self._reader = reader
        self._changed = threading.Condition()
        self._open, self._held = True, False

    def wait(self) -> None:
        """Stand at the gate until it is open."""
        with self._changed:
            while not self._open:
                self._held = True
                self._changed.notify_all()
                self._changed.wait()
            self._held = False

    def set(self) -> None:
        """Open the gate."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Close the gate, and wait until the reader stands at it."""
        with self._changed:
            self._open = False
            while not self._held and threading.current_thread() is not self._reader and self._reader.is_alive():
                self._changed.wait(HELD_SECONDS)


class _Caller(AE):  # type: ignore[misc]
    """An application entity that calls others."""

    def _create_socket(
        self, assoc: Any, address: AddressInformation, tls_args: tuple[ssl.SSLContext, str] | None
    ) -> ClosingSocket:
        assoc._reactor_checkpoint = Gate(assoc)
        connection = ClosingSocket(assoc, address=address)
        if tls_args:
            connection.tls_args = tls_args
        return connection


def settle_library() -> None:
    """Set what pynetdicom knows only as globals: no log, as it quotes what peers say; files go out without decoding."""
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
    _config.LOG_HANDLER_LEVEL = "none"
    _config.STORE_SEND_CHUNKED_DATASET = True


def echo(remote: Remote) -> None:
    """Ask whether a node answers (C-ECHO).

    Raises:
        DeliveryError: as `send`.
    """
    with _association(remote, [build_context(Verification)]) as association:
        _status(association, remote, association.send_c_echo)


def send(
    remote: Remote, paths: Sequence[Path], *, commitments: Commitments | None = None, commitment_seconds: float = 60.0
) -> tuple[str, ...]:
    """Send files by C-STORE on one association; with `commitments`, wait until the node commits to keep them.

    The data sets go out as they are in the files; only where the node takes no other than Implicit VR Little Endian is
    an uncompressed one converted.

    Returns:
        The instances that are stored there.

    Raises:
        DeliveryError: `delivery-unreachable`, `delivery-tls`, `delivery-rejected`, `delivery-unsupported`,
            `delivery-refused`, `delivery-aborted`, `delivery-timeout`, `delivery-uncommitted`.
        ScanRefused: a file is no DICOM object.
    """
    instances = [identify(path) for path in paths]
    with _association(remote, _contexts(instances, commit=commitments is not None), commitments) as association:
        for number, (path, instance) in enumerate(zip(paths, instances, strict=True), start=1):
            _store(association, remote, path, instance, number)
        if commitments is not None:
            _commit(association, remote, instances, commitments, commitment_seconds)
    return tuple(instance.SOPInstanceUID for instance in instances)


def count_instances(remote: Remote, study: str) -> dict[str, int]:
    """Ask a node how many instances each series of a study has (C-FIND, PS3.4 C.4.1).

    Returns:
        SeriesInstanceUID -> NumberOfSeriesRelatedInstances, where the node knows it.

    Raises:
        DeliveryError: as `send`.
    """
    query = Dataset()
    query.QueryRetrieveLevel, query.StudyInstanceUID = "SERIES", study
    query.SeriesInstanceUID = query.NumberOfSeriesRelatedInstances = ""
    model = StudyRootQueryRetrieveInformationModelFind
    counts: dict[str, int] = {}
    with _association(remote, [build_context(model)]) as association:
        begun = time.monotonic()
        for status, found in association.send_c_find(query, model):
            if "Status" not in status:
                raise _broken(remote, begun)
            if status.Status in PENDING and found is not None and found.get("NumberOfSeriesRelatedInstances"):
                counts[str(found.SeriesInstanceUID)] = int(found.NumberOfSeriesRelatedInstances)
            elif status.Status not in (*PENDING, 0x0000):
                raise _refused(remote, status.Status, "the query")
    return counts


def _contexts(instances: Sequence[Instance], *, commit: bool) -> list[Any]:
    """Return one presentation context for each class and syntax, and for each uncompressed class the default one."""
    pairs = {(one.SOPClassUID, one.TransferSyntaxUID): None for one in instances}
    pairs |= {(one.SOPClassUID, ImplicitVRLittleEndian): None for one in instances if one.TransferSyntaxUID in NATIVE}
    contexts = [build_context(*pair) for pair in pairs]
    return [*contexts, build_context(StorageCommitmentPushModel)] if commit else contexts


@contextlib.contextmanager
def _association(remote: Remote, contexts: list[Any], commitments: Commitments | None = None) -> Iterator[Any]:
    """Open an association and release it at the end; abort it where that fails or the work in it did."""
    settle_library()
    entity = _Caller(remote.calling_ae_title)
    entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = remote.timeout_seconds
    entity.network_timeout = None  # each answer has its own time; waiting for a commitment is no fault
    opened: list[Any] = []
    handlers: list[Any] = [(evt.EVT_CONN_OPEN, opened.append)]
    if commitments is not None:
        handlers.append((evt.EVT_N_EVENT_REPORT, _report_to(commitments)))
    begun = time.monotonic()
    association = entity.associate(
        remote.host,
        remote.port,
        contexts,
        remote.ae_title,
        tls_args=None if remote.tls is None else (remote.tls, remote.host),
        evt_handlers=handlers,
    )
    if not association.is_established:
        raise _not_established(association, remote, begun, opened=bool(opened))
    try:
        yield association
        association.release()
    finally:
        if not association.is_released:
            association.abort()


def _report_to(commitments: Commitments) -> Callable[[evt.Event], tuple[int, None]]:
    def report(event: evt.Event) -> tuple[int, None]:
        commitments.report(*reported(event))
        return 0x0000, None

    return report


def reported(event: evt.Event) -> tuple[str, frozenset[str]]:
    """Return the transaction and the safe instances of a report of storage commitment (PS3.4 J.3.3)."""
    information = event.event_information
    safe = {str(item.get("ReferencedSOPInstanceUID", "")) for item in information.get("ReferencedSOPSequence") or ()}
    return str(information.get("TransactionUID", "")), frozenset(safe - {""})


def _not_established(association: Any, remote: Remote, begun: float, *, opened: bool) -> DeliveryError:
    primitive = association.acceptor.primitive if association.is_rejected else _unheard_rejection(association)
    if primitive is not None:
        reason = NOT_RECOGNISED.get(primitive.diagnostic, "no reason given") if primitive.result_source == 1 else "busy"
        message = f"expected {remote.ae_title} to accept an association, found it rejected ({reason})"
        return DeliveryError("delivery-rejected", f"{message}: check the AE titles on both sides", retryable=True)
    if opened and association.accepted_contexts == [] and association.rejected_contexts:
        return _unsupported(remote)
    return _broken(remote, begun) if opened else _unreachable(remote)


def _unheard_rejection(association: Any) -> Any | None:
    """Return a rejection that came, and closed the connection, before the library looked whether it is open."""
    answer = association.dul.receive_pdu(wait=False)
    return answer if isinstance(answer, A_ASSOCIATE) and answer.result else None


def _unreachable(remote: Remote) -> DeliveryError:
    """Find out why there is no connection, which the library does not tell."""
    try:
        with socket.create_connection((remote.host, remote.port), remote.timeout_seconds) as connection:
            if remote.tls is not None:
                remote.tls.wrap_socket(connection, server_hostname=remote.host).close()
        found = "none a moment ago: try again"
    except ssl.SSLError as error:
        found = getattr(error, "verify_message", "") or error.reason or type(error).__name__
        message = f"expected a TLS connection to {remote.host}:{remote.port}, found: {found}: check the certificates"
        return DeliveryError("delivery-tls", message, retryable=True)
    except OSError as error:
        found = f"{error.strerror or type(error).__name__}: check that it runs and the network between"
    message = f"expected a connection to {remote.host}:{remote.port}, found {found}"
    return DeliveryError("delivery-unreachable", message, retryable=True)


def _unsupported(remote: Remote) -> DeliveryError:
    message = f"expected {remote.ae_title} to take these objects, found their class or transfer syntax refused"
    return DeliveryError("delivery-unsupported", f"{message}: allow them there, or ask for others", retryable=False)


def _broken(remote: Remote, begun: float) -> DeliveryError:
    """Name an exchange that ended without an answer: by silence, or by the other side."""
    if time.monotonic() - begun >= 0.95 * remote.timeout_seconds:
        message = f"expected an answer of {remote.ae_title} within {remote.timeout_seconds:g} s, found none: try later"
        return DeliveryError("delivery-timeout", message, retryable=True)
    message = f"expected {remote.ae_title} to finish the exchange, found the association aborted: look at its log"
    return DeliveryError("delivery-aborted", message, retryable=True)


def _refused(remote: Remote, status: int, what: str) -> DeliveryError:
    retryable = status >> 8 == OUT_OF_RESOURCES or status == PROCESSING_FAILURE
    message = f"expected {remote.ae_title} to take {what}, found status 0x{status:04X}: look at its log"
    return DeliveryError("delivery-refused", message, retryable=retryable)


def _status(association: Any, remote: Remote, request: Callable[[], Dataset]) -> int:
    """Make a request; return the status of its answer."""
    begun = time.monotonic()
    if not association.is_established:
        raise _broken(remote, begun)
    answer = request()
    if "Status" not in answer:
        raise _broken(remote, begun)
    return int(answer.Status or 0)


def _store(association: Any, remote: Remote, path: Path, instance: Instance, number: int) -> None:
    accepted = {(cx.abstract_syntax, cx.transfer_syntax[0]) for cx in association.accepted_contexts}
    content: Path | Dataset = path
    if (instance.SOPClassUID, instance.TransferSyntaxUID) not in accepted:
        if (instance.SOPClassUID, ImplicitVRLittleEndian) not in accepted:
            raise _unsupported(remote)
        content = dcmread(path)
    status = _status(association, remote, lambda: association.send_c_store(content, msg_id=number))
    category = status >> 12
    if status not in (0x0000, DUPLICATE) and category != 0xB:  # Bxxx: stored, with a warning (PS3.4 B.2.3)
        raise _refused(remote, status, "an object")


def _commit(
    association: Any, remote: Remote, instances: Sequence[Instance], commitments: Commitments, seconds: float
) -> None:
    """Ask for commitment (N-ACTION) and wait for the report, on this association or another (PS3.4 J.3)."""
    if StorageCommitmentPushModel not in [context.abstract_syntax for context in association.accepted_contexts]:
        message = (
            f"expected {remote.ae_title} to offer storage commitment, found that it does not: set commitment = false"
        )
        raise DeliveryError("delivery-uncommitted", message, retryable=False)
    request = Dataset()
    request.TransactionUID = derived_uid("commitment", str(time.time_ns()), *(one.SOPInstanceUID for one in instances))
    request.ReferencedSOPSequence = Items([_reference(one) for one in instances])
    commitments.expect(request.TransactionUID)
    status = _status(
        association,
        remote,
        lambda: association.send_n_action(
            request, REQUEST_COMMITMENT, StorageCommitmentPushModel, COMMITMENT_INSTANCE, msg_id=len(instances) + 1
        )[0],
    )
    if status != 0x0000:
        raise _refused(remote, status, "a request for storage commitment")
    safe = commitments.wait(request.TransactionUID, seconds=seconds)
    lacking = {one.SOPInstanceUID for one in instances} - (safe or frozenset())
    if lacking:
        found = "no report in time" if safe is None else f"{len(lacking)} of {len(instances)} not kept"
        message = (
            f"expected {remote.ae_title} to commit to {len(instances)} objects, found {found}: they are sent again"
        )
        raise DeliveryError("delivery-uncommitted", message, retryable=True)


def _reference(instance: Instance) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = instance.SOPClassUID, instance.SOPInstanceUID
    return item
