"""Long runs in fp32 take a network with fewer multiplications, where it is proven on the entry's own window."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dints_deploy.catalog.catalog import LoadedEntry, load_entry
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.certified import INPUTS_FILE, LEAST_WINDOWS, may_rewrite
from dints_deploy.runtime.openvino_engine import OpenVinoEngine
from dints_deploy.runtime.preprocess import prepare
from dints_deploy.runtime.segment import run, segment
from dints_deploy.runtime.sessions import WarmSessions, open_sessions
from tests.tiny_entry import TinyNetwork, entry_fields, write_entry

WINDOW = (64, 64, 64)
SCAN = np.random.default_rng(0).normal(size=(1, 1, *WINDOW)).astype(np.float32)


@pytest.fixture(scope="module")
def network() -> bytes:
    """Return a network whose two large convolutions cost 58 GMAC a window."""
    rng = np.random.default_rng(0)
    shapes = [(64, 1, 1, 1, 1), (64, 64, 3, 3, 3), (64, 64, 3, 3, 3), (2, 64, 1, 1, 1)]
    weights = [(rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32) for shape in shapes]
    biases = [np.zeros(len(weight), np.float32) for weight in weights]
    biases[-1][0] = 0.1  # no voxel of an empty window hangs between two labels
    return TinyNetwork(tuple(zip(weights, biases, strict=True))).onnx()


@pytest.fixture(scope="module")
def logits(network: bytes) -> Any:
    session = OpenVinoEngine(threads=2).open(network, window=WINDOW, batch=1, precision="fp32")
    return session.result(session.submit(SCAN))


def entry_with(folder: Path, network: bytes, stored: bytes | None, **changes: Any) -> LoadedEntry:
    extra = {} if stored is None else {INPUTS_FILE: stored}
    fields = entry_fields(classes=2, window=list(WINDOW), **changes)
    return load_entry(write_entry(folder / "tiny", fields, [network], extra=extra))


def windows_file(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def test_a_long_run_is_rewritten_and_a_shorter_one_is_not(tmp_path: Path, network: bytes, logits: Any) -> None:
    entry = entry_with(tmp_path, network, windows_file(windows=SCAN, logits0=logits))
    with WarmSessions() as warm:
        long, short = (warm.open(entry, windows=n, engine="openvino") for n in (LEAST_WINDOWS, LEAST_WINDOWS - 1))
        (rewritten,), (plain,) = long.sessions, short.sessions
        assert rewritten.info.products_saved == pytest.approx(2 * 64**3 * 64**2 * 27 / 2)
        assert plain.info.products_saved == 0
        found = rewritten.result(rewritten.submit(SCAN))
    assert 0 < np.abs(found - logits).max() < 1e-4  # another rounding, and no more


def test_a_whole_scan_has_the_labels_of_the_network_as_it_is(tmp_path: Path, network: bytes, logits: Any) -> None:
    entry = entry_with(tmp_path, network, windows_file(windows=SCAN, logits0=logits))
    side = WINDOW[0] + 3 * (WINDOW[0] - round(WINDOW[0] * entry.spec.overlap))
    data = np.zeros((1, side, side, side), np.float32)
    data[:, : WINDOW[0], : WINDOW[1], : WINDOW[2]] = SCAN[0]  # most windows are empty and run once
    scan = Volume(data, np.eye(4))
    result = segment(scan, entry, engine="openvino")
    assert result.plan.windows == LEAST_WINDOWS
    assert result.windows_run < 10
    assert result.session.products_saved > 0
    plain = run(prepare(scan, entry.spec.preparation), entry.spec, open_sessions(entry, windows=1, engine="openvino"))
    corner = np.s_[0, : WINDOW[0], : WINDOW[1], : WINDOW[2]]
    assert 0.1 < (plain.labels.data[corner] == 1).mean() < 0.9
    assert (result.labels.data[corner] == plain.labels.data[corner]).mean() >= 0.9999
    np.testing.assert_array_equal(result.labels.data[0, -100:], plain.labels.data[0, -100:])


@pytest.mark.parametrize("error", [0.0009, 0.0011])
def test_the_limit_of_an_fp32_engine_decides(tmp_path: Path, network: bytes, logits: Any, error: float) -> None:
    reference = logits.copy()
    reference[0, 0, 5, 6, 7] += error
    entry = entry_with(tmp_path, network, windows_file(windows=SCAN, logits0=reference))
    assert entry.spec.parity.max_abs_logit == 0.001
    (session,) = open_sessions(entry, windows=LEAST_WINDOWS, engine="openvino")
    assert (session.info.products_saved > 0) == (error < 0.001)
    _, _, found = session.info.why.partition("expected max_abs_logit of 0.001, found ")
    assert bool(found) == (error > 0.001)
    assert not found or float(found) == pytest.approx(error, abs=1e-5)


def test_labels_count_where_logits_are_close(tmp_path: Path, network: bytes, logits: Any) -> None:
    swapped = logits[:, ::-1].copy()
    entry = entry_with(tmp_path, network, windows_file(windows=SCAN, logits0=swapped), parity={"max_abs_logit": 1e6})
    (session,) = open_sessions(entry, windows=LEAST_WINDOWS, engine="openvino")
    assert session.info.products_saved == 0
    assert "expected min_label_agreement" in session.info.why


@pytest.mark.parametrize("stored", ["none", "NaN", "another shape", "cut", "no window", "no archive"])
def test_what_is_not_proven_runs_as_it_is(tmp_path: Path, network: bytes, logits: Any, stored: str) -> None:
    whole, array = windows_file(windows=SCAN, logits0=logits), io.BytesIO()
    np.save(array, SCAN)
    files = {
        "none": None,
        "NaN": windows_file(windows=SCAN, logits0=logits * np.nan),
        "another shape": windows_file(windows=SCAN[..., :8], logits0=logits),
        "cut": whole[: len(whole) // 2],
        "no window": windows_file(windows=SCAN[:0], logits0=logits[:0]),
        "no archive": array.getvalue(),
    }
    entry = entry_with(tmp_path, network, files[stored])
    (session,) = open_sessions(entry, windows=LEAST_WINDOWS, engine="openvino")
    assert session.info.products_saved == 0
    assert ("as it is written: " in session.info.why) == (stored != "none")
    np.testing.assert_allclose(session.result(session.submit(SCAN)), logits, rtol=0, atol=1e-5)


def test_members_of_an_ensemble_run_as_they_are(tmp_path: Path, network: bytes, logits: Any) -> None:
    stored = windows_file(windows=SCAN, logits0=logits, logits1=logits)
    fields = entry_fields(classes=2, window=list(WINDOW), ensemble=2)
    folder = write_entry(tmp_path / "two", fields, [network, network], extra={INPUTS_FILE: stored})
    sessions = open_sessions(load_entry(folder), windows=LEAST_WINDOWS, engine="openvino")
    assert [session.info.products_saved for session in sessions] == [0, 0]


def test_another_engine_says_nothing_of_it(tmp_path: Path, network: bytes, logits: Any) -> None:
    entry = entry_with(tmp_path, network, windows_file(windows=SCAN, logits0=logits + 1))
    (session,) = open_sessions(entry, windows=LEAST_WINDOWS, engine="onnx")
    assert session.info.products_saved == 0
    assert session.info.why == "asked for"


@pytest.mark.parametrize(
    ("windows", "engine", "precision", "expected"),
    [
        (LEAST_WINDOWS, "openvino", "fp32", True),
        (LEAST_WINDOWS - 1, "openvino", "fp32", False),
        (LEAST_WINDOWS, "onnx", "fp32", False),
        (LEAST_WINDOWS, "openvino", "bf16", False),
    ],
)
def test_long_runs_of_openvino_in_fp32_may_be_rewritten(
    tmp_path: Path, network: bytes, logits: Any, windows: int, engine: str, precision: str, expected: bool
) -> None:
    entry = entry_with(tmp_path, network, windows_file(windows=SCAN, logits0=logits))
    assert may_rewrite(entry, windows, engine, precision) == expected
