"""A real worker process under supervision: it works, stays warm, and its end in any way costs only the attempt."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dints_deploy.errors import WorkerError
from dints_deploy.service.supervise import Limits, Worker
from dints_deploy.service.worker import Task, stem_of
from tests.command import good_scan
from tests.daemons import ENTRY, site


@contextmanager
def supervised(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, fault: str = "", **limits: Any
) -> Iterator[tuple[Worker, Path]]:
    """Yield a worker that will find the site's zoo, and the folder of objects."""
    place = site(folder)
    for name, value in (place.variables() | {"DINTS_FAULT": fault}).items():
        monkeypatch.setenv(name, value)
    worker = Worker(Limits(**{"job_seconds": 60.0} | limits))
    try:
        yield worker, folder / "objects"
    finally:
        worker.stop()


def task(folder: Path, objects: Path, *, number: int = 0) -> Task:
    """Return a task with one NIfTI file."""
    data = good_scan(folder, f"scan{number}.nii.gz").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    path = objects / digest[:2] / digest
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return Task(
        job=f"job{number}",
        kind="nifti",
        objects=str(objects),
        folder=str(folder / "work" / str(number)),
        inputs=((digest, "Müller, Hans.nii.gz"),),
        entry=ENTRY,
        outputs=("nifti",),
        when="2026-01-02T03:04:05.000+00:00",
        engine="onnx",
        precision="fp32",
        device="cpu",
        threads=1,
    )


def always() -> bool:
    return True


def test_a_worker_does_task_after_task_in_one_process_and_leaves_inputs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervised(tmp_path, monkeypatch) as (worker, objects):
        pids, loads = set(), []
        for number in range(3):
            one = task(tmp_path, objects, number=number)
            answer = worker.run(one, always)
            assert answer is not None
            assert answer["kind"] == "done"
            ((name, digest),) = answer["files"].items()
            made = Path(one.folder) / "out" / name
            assert hashlib.sha256(made.read_bytes()).hexdigest() == digest
            assert name == "M_ller_Hans_seg.nii.gz"
            assert answer["about"]["input"] == one.inputs[0][0]
            pids.add(worker.pid)
            loads.append(answer["seconds"].get("load", 0.0))
        assert len(pids) == 1
        assert max(loads[1:]) < loads[0]  # the network stays loaded
    for path in objects.glob("*/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_a_damaged_object_and_an_unknown_entry_are_answers_not_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervised(tmp_path, monkeypatch) as (worker, objects):
        one = task(tmp_path, objects)
        ((digest, name),) = one.inputs
        answers = []
        changes: list[dict[str, Any]] = [{"entry": "no-such-entry"}, {"inputs": (("0" * 64, name),)}, {}]
        for number, change in enumerate(changes):
            if not change:
                (objects / digest[:2] / digest).write_bytes(b"rotten")
            changed = replace(one, folder=str(tmp_path / "work" / f"x{number}"), **change)
            answers.append(worker.run(changed, always))
        assert [(a or {})["code"] for a in answers] == ["entry-unknown", "object-damaged", "object-damaged"]


ENDS = [
    ("work-inputs:1:kill", {}, "worker-crashed", "signal 9"),
    ("work-inputs:1:hang", {"silence_seconds": 6.0}, "worker-hung", "no sign of life|sign of life"),
    ("work-inputs:1:pause", {"job_seconds": 4.0}, "worker-hung", "within 4 s"),
]


@pytest.mark.parametrize(("fault", "limits", "code", "said"), ENDS)
def test_a_worker_that_crashes_or_hangs_is_ended_and_the_next_one_works(
    fault: str, limits: dict[str, Any], code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervised(tmp_path, monkeypatch, fault=fault, **limits) as (worker, objects):
        with pytest.raises(WorkerError, match=said) as caught:
            worker.run(task(tmp_path, objects), always)
        assert caught.value.code == code
        assert worker.pid is None
        monkeypatch.setenv("DINTS_FAULT", "")
        answer = worker.run(task(tmp_path, objects, number=1), always)
        assert answer is not None
        assert answer["kind"] == "done"


def test_a_worker_that_wants_too_much_memory_says_so_or_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 900 << 20
    with supervised(tmp_path, monkeypatch, fault="work-inputs:1:grow", memory_bytes=limit) as (worker, objects):
        try:
            answer = worker.run(task(tmp_path, objects), always)
            assert answer is not None
            code = answer["code"]
        except WorkerError as error:
            code = error.code
        assert code == "worker-memory"


def test_a_task_that_is_not_wanted_any_more_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with supervised(tmp_path, monkeypatch, fault="work-inputs:1:pause") as (worker, objects):
        end = time.monotonic() + 5.0
        assert worker.run(task(tmp_path, objects), lambda: time.monotonic() < end) is None
        assert worker.pid is None


def test_a_worker_dies_with_its_daemon(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, os, time\n"
        "w = subprocess.Popen([sys.executable, '-m', 'dints_deploy.service.worker', str(os.getpid()), '0'],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "while b'ready' not in w.stdout.readline(): pass\n"
        "print(w.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        daemon.send_signal(signal.SIGKILL)
    end = time.monotonic() + 5.0
    while is_running(pid):
        assert time.monotonic() < end, "the worker outlived its daemon"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Say whether a process runs; one that ended and was not waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.nii.gz", "a"), ("../../etc/passwd.nii", "_.._etc_passwd"), (".nii", "scan"), ("x" * 300 + ".nii", "x" * 80)],
)
def test_a_file_name_becomes_a_harmless_stem(name: str, stem: str) -> None:
    assert stem_of(name) == stem
