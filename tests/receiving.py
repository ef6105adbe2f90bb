"""An open DICOM port of the appliance with a real intake behind it, for tests with real senders."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage

from dints_deploy.config.intake import Listener
from dints_deploy.dicom.network import Commitments, Remote
from dints_deploy.service.intake import DurableIntake, Room
from dints_deploy.service.model import Intake
from dints_deploy.service.receive import Receiver
from dints_deploy.service.retention import make_folders
from dints_deploy.service.store import Store, open_store
from tests.peers import free_port, needs

OURS = "DINTS"


@dataclass(frozen=True)
class Appliance:
    """A port that receives into `data_dir`."""

    data_dir: Path
    port: int
    receiver: Receiver
    store: Store

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query on the database."""
        return [tuple(row) for row in self.store._connection.execute(query)]

    def instances(self) -> dict[str, Path]:
        """Return SOPInstanceUID -> file of every object that was taken."""
        found = self.rows("SELECT uid, sha256 FROM instance ORDER BY id")
        return {uid: self.data_dir / "objects" / digest[:2] / digest for uid, digest in found}

    def leftovers(self) -> list[str]:
        """Return what lies in the folder of files that are coming in."""
        return sorted(path.name for path in (self.data_dir / "incoming").iterdir())

    def remote(self, **changes: Any) -> Remote:
        """Return the port as a node to call."""
        fields: dict[str, Any] = {"ae_title": OURS, "calling_ae_title": "MR1", "timeout_seconds": 5.0}
        return Remote("127.0.0.1", self.port, **(fields | changes))


@contextmanager
def receiving(
    folder: Path, *, room: Room | None = None, intake: Intake | None = None, titles: Any = None, **listener: Any
) -> Iterator[Appliance]:
    """Open a port until the end of the block; `listener` are fields of its configuration."""
    data_dir = folder / "data"
    make_folders(data_dir)
    store = open_store(data_dir)
    receiver = Receiver(intake or DurableIntake(store, data_dir, room or Room()), data_dir / "incoming", Commitments())
    port = free_port()
    fields = {"address": "127.0.0.1", "port": port, "titles": titles or [{"ae_title": OURS, "callers": ["*"]}]}
    receiver.start([Listener.model_validate(fields | listener)])
    try:
        yield Appliance(data_dir, port, receiver, store)
    finally:
        receiver.stop(seconds=2.0)
        store.close()


def dcmtk(program: str, port: int, *words: object, calling: str = "MR1", called: str = OURS) -> tuple[int, str]:
    """Run a sender of DCMTK against a port of this machine; return its exit code and what it said."""
    needs(program)
    command = [program, "-v", "-aet", calling, "-aec", called, "127.0.0.1", str(port), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


@contextmanager
def association(port: int) -> Iterator[Any]:
    """Open an association by pynetdicom that can send CT images, and close its connection at the end."""
    entity = AE("MR1")
    entity.add_requested_context(CTImageStorage, "1.2.840.10008.1.2.1")
    entity.dimse_timeout = 5
    one = entity.associate("127.0.0.1", port, ae_title=OURS)
    assert one.is_established
    connection = one.dul.socket.socket
    try:
        yield one
    finally:
        if one.is_established:
            one.release()
        connection.close()
