"""A checkpoint is the one that was written, or it is refused; the old one stays until the new one is whole."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dints_deploy.errors import DatasetError, OutputError
from dints_search.checkpoint import load_checkpoint, save_checkpoint
from dints_search.metrics import read_metrics
from tests.small_disk import small_disk
from tests.tiny_entry import full_disk
from tests.tiny_task import search_tiny, train, write_task

DIGEST = "d" * 64


def state(size: int = 20, seed: int = 0) -> dict[str, Any]:
    """Return what a checkpoint holds, in small."""
    weights = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return {"configuration": DIGEST, "step": 7, "network": {"weight": weights}, "losses": [0.5, 0.25]}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Say whether two states hold the same."""
    weights = [found.get("network", {}).get("weight") for found in (a, b)]
    rest = [{name: value for name, value in found.items() if name != "network"} for found in (a, b)]
    return torch.equal(*weights) and rest[0] == rest[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a good checkpoint."""
    path = tmp_path_factory.mktemp("written") / "checkpoint.pt"
    save_checkpoint(path, state())
    return path.read_bytes()


def test_a_checkpoint_holds_what_was_saved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", state())
    assert same(load_checkpoint(tmp_path / "c.pt", DIGEST), state())
    save_checkpoint(tmp_path / "c.pt", state(seed=1))
    assert same(load_checkpoint(tmp_path / "c.pt", DIGEST), state(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
def test_changed_bytes_are_refused_or_change_nothing(
    written: bytes, tmp_path: Path, places: list[tuple[float, int]]
) -> None:
    data = bytearray(written)
    for share, change in places:
        data[int(share * len(data))] ^= change
    assert verdict(tmp_path / "c.pt", bytes(data)) in ("checkpoint-invalid", "the same")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_cut_checkpoint_is_refused(written: bytes, tmp_path: Path, share: float) -> None:
    assert verdict(tmp_path / "c.pt", written[: int(share * len(written))]) == "checkpoint-invalid"


def verdict(path: Path, data: bytes) -> str:
    """Return the code that these bytes are refused with, `the same` for the good state, or `ANOTHER STATE`."""
    path.write_bytes(data)
    try:
        found = load_checkpoint(path, DIGEST)
    except DatasetError as refusal:
        return refusal.code
    return "the same" if same(found, state()) else "ANOTHER STATE"


def test_every_byte_of_the_weights_is_covered(written: bytes, tmp_path: Path) -> None:
    raw = state()["network"]["weight"].numpy().tobytes()
    begin = written.index(raw)
    for place in range(begin, begin + len(raw), 97):
        data = bytearray(written)
        data[place] ^= 1
        assert verdict(tmp_path / "c.pt", bytes(data)) == "checkpoint-invalid"


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", state() | {"extra": Evil(tmp_path / "harm")})
    with pytest.raises(DatasetError) as caught:
        load_checkpoint(tmp_path / "c.pt", DIGEST)
    assert caught.value.code == "checkpoint-invalid"
    assert not (tmp_path / "harm").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "tensor.pt", torch.zeros(3))  # type: ignore[arg-type]
    torch.save(state(), tmp_path / "bare.pt")
    (tmp_path / "text.pt").write_text("PK\x03\x04 not an archive")
    (tmp_path / "empty.pt").touch()
    for name in ("tensor.pt", "bare.pt", "text.pt", "empty.pt", "missing.pt", "."):
        with pytest.raises(DatasetError) as caught:
            load_checkpoint(tmp_path / name, DIGEST)
        assert caught.value.code == "checkpoint-invalid"


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", state())
    for digest in ("e" * 64, "", DIGEST[:-1]):
        with pytest.raises(DatasetError) as caught:
            load_checkpoint(tmp_path / "c.pt", digest)
        assert caught.value.code == "run-mismatch"


@contextmanager
def tiny_disk(folder: Path) -> Iterator[None]:
    """Make `folder` a disk of 300 kB where this process may mount one, else limit the size of its files."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    with ExitStack() as undo:
        if os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            undo.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)  # torch keeps the file open
        else:
            undo.enter_context(full_disk(250_000))
        yield


def test_a_full_disk_leaves_the_old_checkpoint_and_no_part_of_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "disk" / "checkpoint.pt"
    path.parent.mkdir()
    with tiny_disk(path.parent):
        save_checkpoint(path, state())
        old = path.read_bytes()
        with pytest.raises(OutputError) as caught:
            save_checkpoint(path, state(size=400))
        assert caught.value.code == "disk-full"
        assert path.read_bytes() == old
        assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]
        assert same(load_checkpoint(path, DIGEST), state())


def test_a_run_that_met_a_full_disk_goes_on_when_there_is_room(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    train(tmp_path, precision="fp32", steps=4, checkpoint_every=4)
    whole = tmp_path / "run" / "weights.safetensors"
    expected = whole.read_bytes()
    whole.unlink()
    with full_disk(len(expected) // 2), pytest.raises(OutputError) as caught:
        train(tmp_path, precision="fp32", steps=4, checkpoint_every=4, resume=True)
    assert caught.value.code == "disk-full"
    assert not whole.exists()
    assert not list((tmp_path / "run").glob(".partial*"))
    train(tmp_path, precision="fp32", steps=4, checkpoint_every=4, resume=True)
    assert whole.read_bytes() == expected


@pytest.mark.parametrize("kilobytes", [16, 64])
def test_a_search_on_a_full_disk_says_so_in_one_error_and_goes_on_when_there_is_room(
    tmp_path: Path, kilobytes: int
) -> None:
    """The smaller disk is full of metrics before a checkpoint is due, the other has no room for the checkpoint."""
    options: dict[str, Any] = {"steps": 80, "warmup": 0.99, "checkpoint_every": 80}
    write_task(tmp_path / "task")
    with small_disk(tmp_path / "run", kilobytes=kilobytes):
        assert refused(search_tiny, tmp_path, **options) == "disk-full"
        assert [p for p in (tmp_path / "run").iterdir() if p.name.startswith((".partial", "checkpoint"))] == []
        steps = [figures["step"] for figures in read_metrics(tmp_path / "run")]
        assert steps == list(range(1, len(steps) + 1))
        assert (len(steps) == 80) == (kilobytes == 64)
        kept = tmp_path / "kept"
        shutil.copytree(tmp_path / "run", kept / "run")
    shutil.copytree(tmp_path / "task", kept / "task")
    search_tiny(kept, resume=True, **options)
    assert [figures["step"] for figures in read_metrics(kept / "run")] == list(range(1, 81))


def refused(run: Callable[..., Path], folder: Path, **options: Any) -> str:
    """Return the code that a run ends with, and let go of its frames: what reads its patches keeps files open."""
    try:
        run(folder, **options)
    except OutputError as error:
        return error.code
    finally:
        gc.collect()
    return ""


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        save_checkpoint(tmp_path / "missing" / "c.pt", state())
    assert caught.value.code == "output-unwritable"
