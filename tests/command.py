"""The real command line in a process of its own, scans for it, and a zoo that calls every voxel above 500 label 1."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dints_deploy.errors import REASONS
from tests.nifti_files import nifti
from tests.phantoms import affine
from tests.tiny_entry import Fields, entry_fields, threshold_network, write_entry

REFUSED, FAILED, USAGE = 3, 1, 2
THRESHOLD = 500.0
CROP = {"extent_min": [8] * 3, "extent_max": [90] * 3, "spacing_max": [2] * 3, "shape_min": [8] * 3}


def default_interrupt() -> None:
    """Undo what a shell does to what it starts in the background, the tests perhaps: it ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Done:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Return the one document on standard output."""
        return json.loads(self.out)

    @property
    def cases(self) -> list[dict[str, Any]]:
        """Return the cases of `segment --json`."""
        cases: list[dict[str, Any]] = self.json["cases"]
        return cases


@dataclass(frozen=True)
class Machine:
    """A folder in which commands run, with a zoo and a state folder of its own."""

    folder: Path

    def environment(self) -> dict[str, str]:
        """Return the variables that commands run with."""
        own = {"DINTS_ZOO": str(self.folder / "zoo"), "DINTS_STATE": str(self.folder / "state")}
        return os.environ | own | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}

    def run(self, *words: object, file_bytes: int | None = None, more: Mapping[str, str] | None = None) -> Done:
        """Run a command; no file may grow beyond `file_bytes`."""
        start = [sys.executable, "-m", "dints_deploy"]
        limit = [] if file_bytes is None else ["prlimit", f"--fsize={file_bytes}"]
        done = subprocess.run(
            [*limit, *start, *map(str, words)],
            cwd=self.folder,
            env=self.environment() | dict(more or {}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def segment(self, *words: object, **options: Any) -> Done:
        """Run `segment --json` with one thread on ONNX Runtime, which starts quickest."""
        return self.run("segment", *words, "--engine", "onnx", "--threads", 1, "--json", **options)

    def add(self, fields: Fields) -> None:
        """Put an entry with these fields into the zoo."""
        write_entry(self.folder / "zoo" / fields["name"], fields, [threshold_network(THRESHOLD).onnx()])


def threshold_entry(name: str, **changes: Any) -> Fields:
    """Return the fields of an entry with one label and a window of 16 voxels; `accepts` replaces single limits."""
    fields = entry_fields(name, classes=2, window=[16, 16, 16])
    accepts = fields["accepts"] | changes.pop("accepts", {})
    return fields | changes | {"accepts": accepts}


def three_entries(folder: Path) -> Machine:
    """Return a machine with three entries: `open` takes nearly all, `crop` only crops, `pair` two channels."""
    machine = Machine(folder)
    machine.add(threshold_entry("open"))
    machine.add(threshold_entry("crop", accepts=CROP | {"about": "a crop, not a whole head"}, spacing=[1, 1, 1]))
    channels = [{"name": n, "modality": "MR", "intensity": {"scheme": "identity"}} for n in ("T1", "T2")]
    machine.add(threshold_entry("pair", channels=channels))
    return machine


def values(*shape: int) -> NDArray[np.int16]:
    """Return voxels with a bright block in a corner, so that every flip shows."""
    data = np.random.default_rng(0).integers(0, 400, shape).astype(np.int16)
    data[tuple(slice(0, max(1, n // 3)) for n in shape[:3])] += 400
    return data


def write_scan(path: Path, data: NDArray[Any], matrix: NDArray[np.float64] | None = None) -> Path:
    """Write a scan, packed where its name says so, and return its path."""
    raw = nifti(data, sform=affine() if matrix is None else matrix)
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)
    return path


def good_scan(folder: Path, name: str = "good.nii.gz") -> Path:
    """Write a scan that `open` and `crop` segment."""
    return write_scan(folder / name, values(18, 20, 17))


def files(folder: Path) -> list[str]:
    """Return every file below a folder, hidden and partial ones included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def assert_one_sentence(done: Done, code: str, exit_code: int, name: str) -> None:
    """Check that `segment --json` of one scan ended as told, with one sentence and nothing else."""
    assert done.code == exit_code
    assert re.fullmatch(rf"error: {re.escape(name)}: expected [^\n]+ \[{code}\]\n", done.err), done.err
    (case,) = done.cases
    assert (case["case"], case["code"]) == (name, code)
    assert case["status"] == ("refused" if exit_code == REFUSED else "failed")
    assert case["message"].startswith("expected ")
    assert code in REASONS
    assert done.json["exit_code"] == exit_code
