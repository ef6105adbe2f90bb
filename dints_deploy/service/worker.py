"""The worker process: takes tasks as JSON lines on standard input, answers as JSON lines on what was standard output.

It touches nothing but its own folder and the objects it reads: what it makes counts only when the daemon has moved and
noted it, so killing a worker at any moment loses nothing but time. It dies with the daemon.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from dints_deploy.errors import DintsError, OutputError, ScanRefused, ServiceError
from dints_deploy.files import output_error, replacing, sha256_file, sync_folder
from dints_deploy.service.fault import reach

if TYPE_CHECKING:
    from dints_deploy.catalog.catalog import LoadedEntry
    from dints_deploy.process.case import Outcome
    from dints_deploy.runtime.sessions import WarmSessions

BEAT_SECONDS: Final = 1.0
"""Time between two signs of life. They need the interpreter's lock: native code that hangs with it gives none."""

PR_SET_PDEATHSIG: Final = 1
"""Of prctl(2)."""

OOM_SCORE: Final = 800
"""The kernel shall kill a worker before the daemon when memory runs out."""

SAFE_STEM: Final = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Task:
    """One job as the worker is told.

    Attributes:
        objects: the folder of objects by digest.
        folder: the worker's own, which does not exist yet; the study goes to `in/`, the files to `out/`.
        inputs: SHA-256 and file name of each object.
        when: date and time of the DICOM objects.
        supersedes: DICOM files of the result that this one replaces.
    """

    job: str
    kind: str
    objects: str
    folder: str
    inputs: tuple[tuple[str, str], ...]
    entry: str
    outputs: tuple[str, ...]
    when: str
    engine: str
    precision: str
    device: str
    threads: int | None
    supersedes: tuple[str, ...] = ()

    def line(self) -> bytes:
        """Return the task as a line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def of(cls, line: bytes) -> Task:
        """Return the task of a line."""
        fields = json.loads(line)
        fields["inputs"] = tuple((digest, name) for digest, name in fields["inputs"])
        return cls(**fields | {name: tuple(fields[name]) for name in ("outputs", "supersedes")})


class Answers:
    """The way back to the daemon; used by the worker and by its heart."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._lock = out, threading.Lock()

    def say(self, **fields: Any) -> None:
        """Write one answer; end the process where nobody listens any more."""
        with self._lock:
            try:
                self._out.write(json.dumps(fields).encode() + b"\n")
                self._out.flush()
            except OSError:
                os._exit(1)


def main() -> None:
    """Serve tasks until standard input ends. Arguments: the daemon's process, and bytes of memory (0: no limit)."""
    die_with(int(sys.argv[1]))
    limit_memory(int(sys.argv[2]))
    answers = Answers(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # libraries print what they please: only answers may go back
    threading.Thread(target=_beat, args=(answers,), name="heart", daemon=True).start()
    from dints_deploy.runtime.sessions import WarmSessions

    answers.say(kind="ready")
    entries: dict[str, LoadedEntry] = {}
    with WarmSessions() as warm:
        for line in sys.stdin.buffer:
            answers.say(**run_one(Task.of(line), entries, warm))


def die_with(daemon: int) -> None:
    """Let the kernel kill this process when the daemon's thread that started it ends (prctl(2))."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != daemon:
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal goes to all: the daemon decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def limit_memory(count: int) -> None:
    """Let this process have `count` bytes of private memory, dump no core, and be the kernel's first choice."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if count:
        resource.setrlimit(resource.RLIMIT_DATA, (count, count))
    with Path("/proc/self/oom_score_adj").open("w") as file:
        file.write(str(OOM_SCORE))


def run_one(task: Task, entries: dict[str, LoadedEntry], warm: WarmSessions) -> dict[str, Any]:
    """Do a task and return the answer, whatever happens.

    Args:
        entries: those that were loaded for earlier tasks.
        warm: their networks.
    """
    reach("work-start")
    begin = time.monotonic()
    out = Path(task.folder) / "out"
    try:
        scan = materialise(task)
        reach("work-inputs")
        read = time.monotonic()
        outcome = _process(task, scan, out, entries, warm)
        keep_equal(out, task.supersedes)
        answer = {"kind": "done", "about": _about(outcome.record)}
        seconds = outcome.record["seconds"] | {"materialise": read - begin}
    except ScanRefused as refusal:
        answer = {"kind": "refused", "code": refusal.code, "message": refusal.message, "about": {"entry": task.entry}}
        seconds = {}
    except DintsError as error:
        entries.pop(task.entry, None)  # it may have been replaced: read it again
        return {"kind": "failed", "code": error.code, "message": error.message}
    except MemoryError:
        return {"kind": "failed", "code": "worker-memory", "message": "expected room for the job, found none left"}
    except Exception as error:  # noqa: BLE001  the edge of the process: anything else is a fault of the software
        return {"kind": "failed", "code": "worker-failed", "message": f"found {_where(error)}: report it"}
    try:
        files = _seal_folder(out)
    except OutputError as error:
        return {"kind": "failed", "code": error.code, "message": error.message}
    reach("work-end")
    return answer | {"files": files, "seconds": seconds | {"job": time.monotonic() - begin}}


def materialise(task: Task) -> Path:
    """Link the study's objects into the worker's folder, each checked against its digest; return what to segment.

    Raises:
        ServiceError: `object-damaged`. OutputError: the folder cannot be made.
    """
    folder = Path(task.folder) / "in"
    try:
        folder.mkdir(parents=True)
        (Path(task.folder) / "out").mkdir()
        for number, (digest, name) in enumerate(task.inputs):
            target = folder / (stem_of(name) + suffix_of(name) if task.kind == "nifti" else f"{number:06d}.dcm")
            target.hardlink_to(Path(task.objects) / digest[:2] / digest)
            if sha256_file(target) != digest:
                raise _damaged(digest, "other bytes")
    except FileNotFoundError as error:
        raise _damaged(Path(str(error.filename)).name, "none") from error
    except OSError as error:
        raise output_error(folder, error) from error
    return target if task.kind == "nifti" else folder


def stem_of(name: str) -> str:
    """Return a file's name without suffix, of few harmless characters."""
    stem = name.removesuffix(suffix_of(name))
    return SAFE_STEM.sub("_", stem).strip(".")[:80] or "scan"


def suffix_of(name: str) -> str:
    """Return a NIfTI file's suffix."""
    return next((suffix for suffix in (".nii.gz", ".nii") if name.lower().endswith(suffix)), "")


def _process(task: Task, scan: Path, out: Path, entries: dict[str, LoadedEntry], warm: WarmSessions) -> Outcome:
    from dints_deploy.catalog.catalog import load_entry
    from dints_deploy.process.case import Request, process_case

    if task.entry not in entries:
        entries[task.entry] = load_entry(task.entry)
    entry = entries[task.entry]
    request = Request(
        channels={"": scan},
        stem=out / (f"{stem_of(scan.name)}_seg" if task.kind == "nifti" else "result"),
        formats=task.outputs,
        engine=task.engine,
        precision=task.precision,
        device=task.device,
        threads=task.threads,
        when=datetime.fromisoformat(task.when),
        supersedes=tuple(map(Path, task.supersedes)),
    )
    return process_case(request, {entry.spec.name: entry.spec}, lambda name: entry, warm=warm)


def keep_equal(out: Path, earlier: Sequence[str]) -> None:
    """Put the stored file in the place of a new one that has its SOPInstanceUID: what came late was not of its series.

    UIDs follow from input and mask, so both say the same of the same slices; and one UID must never have two contents.
    """
    from dints_deploy.dicom.instance import identify

    for stored in map(Path, earlier):
        made = out / stored.name
        if made.exists() and identify(made).SOPInstanceUID == identify(stored).SOPInstanceUID:
            with replacing(made) as partial:
                shutil.copyfile(stored, partial)


def _seal_folder(out: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of what was written; every file is durable already, the folder is made so."""
    try:
        files = {path.name: sha256_file(path) for path in sorted(out.iterdir())}
        sync_folder(out)
    except OSError as error:
        raise output_error(out, error) from error
    return files


def _about(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what the audit trail says of how a result was made."""
    model, engine = record["model"], record["engine"]
    return {
        "entry": f"{model['entry']} {model['version']}",
        "weights": " ".join(model["weights_sha256"]),
        "engine": f"{engine['name']} {engine['version']} {engine['device']} {engine['precision']}",
        "input": " ".join(record["scan"]["sha256"].values()),
    }


def _where(error: BaseException) -> str:
    """Return kind and place of an exception, never its text: it may quote the scan."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    return type(error).__name__ + place


def _damaged(digest: str, found: str) -> ServiceError:
    message = f"expected the object {digest[:12]} as it was received, found {found}: check the disk, send it again"
    return ServiceError("object-damaged", message)


def _beat(answers: Answers) -> None:
    while True:
        answers.say(kind="beat")
        time.sleep(BEAT_SECONDS)


if __name__ == "__main__":
    main()
