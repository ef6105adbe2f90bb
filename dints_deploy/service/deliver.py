"""Take results to a destination: a folder, a PACS by C-STORE, a DICOMweb server by STOW-RS.

A delivery is repeated with the same stored files until it succeeds, so each way is idempotent: a folder keeps a file
that is already there, and a server knows an instance by its UID.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dints_deploy.config.delivery import Destination, DicomDestination, FolderDestination, StowDestination
from dints_deploy.config.load import read_token
from dints_deploy.config.tls import client_context
from dints_deploy.dicom.instance import identify
from dints_deploy.dicom.network import Commitments, Remote, echo
from dints_deploy.dicom.network import send as send_dicom
from dints_deploy.errors import DeliveryError, OutputError, ScanRefused, UsageError
from dints_deploy.files import make_folder, replacing, sha256_file
from dints_deploy.service.stow import Service
from dints_deploy.service.stow import send as send_stow


@dataclass(frozen=True)
class Receipt:
    """What a destination took.

    Attributes:
        destination: its name.
        stored: SOP instances, or the names of files that are no DICOM objects.
        committed: whether it also committed to keep them (PS3.4 J).
    """

    destination: str
    stored: tuple[str, ...]
    committed: bool = False


def send(
    destination: Destination, files: Sequence[Path], *, name: str, commitments: Commitments | None = None
) -> Receipt:
    """Take files to a destination.

    Args:
        destination: where to.
        files: DICOM objects; for a folder, files of any kind.
        name: of the folder under a folder destination: the job's, never text of a study.
        commitments: where the listeners report storage commitment to.

    Raises:
        DeliveryError: with its code, and whether a later attempt can help.
    """
    try:
        return _send(destination, files, name, commitments)
    except DeliveryError:
        raise
    except (ScanRefused, UsageError) as error:  # a stored file, a certificate or a token that is not what it was
        raise DeliveryError("delivery-unready", error.message, retryable=True) from error


def _send(destination: Destination, files: Sequence[Path], name: str, commitments: Commitments | None) -> Receipt:
    if isinstance(destination, FolderDestination):
        return Receipt(destination.name, tuple(_place(file, destination.path / name) for file in files))
    objects = [file for file in files if file.suffix == ".dcm"]
    if isinstance(destination, StowDestination):
        return Receipt(destination.name, send_stow(stow_service(destination), objects))
    wanted = (commitments or Commitments()) if destination.commitment else None
    stored = send_dicom(
        remote_of(destination), objects, commitments=wanted, commitment_seconds=destination.commitment_seconds
    )
    return Receipt(destination.name, stored, committed=destination.commitment)


def probe(destination: Destination) -> None:
    """Ask a destination whether it is there, without sending anything.

    Raises:
        DeliveryError: it is not.
    """
    if isinstance(destination, DicomDestination):
        echo(remote_of(destination))
    elif isinstance(destination, FolderDestination):
        _writable(destination.path)


def remote_of(destination: DicomDestination) -> Remote:
    """Return the node that a destination stands for."""
    return Remote(
        host=destination.host,
        port=destination.port,
        ae_title=destination.ae_title,
        calling_ae_title=destination.calling_ae_title,
        timeout_seconds=destination.timeout_seconds,
        tls=None if destination.tls is None else client_context(destination.tls),
    )


def stow_service(destination: StowDestination) -> Service:
    """Return the server that a destination stands for."""
    return Service(
        url=destination.url,
        token=None if destination.token_file is None else read_token(destination.token_file),
        timeout_seconds=destination.timeout_seconds,
        tls=None if destination.tls is None else client_context(destination.tls),
    )


def _place(file: Path, folder: Path) -> str:
    """Copy a file into a folder durably and at once; one that is there already must be the same."""
    target = folder / file.name
    try:
        if target.exists():
            if sha256_file(target) == sha256_file(file):
                return _name(file)
            message = f"expected no other file at {target}, found one that differs: move it away"
            raise DeliveryError("delivery-conflict", message, retryable=False)
        make_folder(folder)
        with replacing(target) as partial:
            shutil.copyfile(file, partial)
    except (OutputError, OSError) as error:
        raise _unwritable(folder, error) from error
    return _name(file)


def _name(file: Path) -> str:
    return identify(file).SOPInstanceUID if file.suffix == ".dcm" else file.name


def _writable(folder: Path) -> None:
    try:
        make_folder(folder)
        with replacing(folder / "writable") as partial:
            partial.write_bytes(b"")
        (folder / "writable").unlink()
    except (OutputError, OSError) as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OutputError | OSError) -> DeliveryError:
    found = error.code if isinstance(error, OutputError) else error.strerror or type(error).__name__
    message = f"expected to write into {folder}, found: {found}: check that it is mounted, its rights and room"
    return DeliveryError("delivery-folder", message, retryable=True)
