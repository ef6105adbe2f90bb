"""The shipped entry is what its files say: real scores on real cases that it has not seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dints_deploy.catalog.catalog import load_entry, shipped_zoo, verify_entry
from dints_deploy.catalog.dataset import read_dataset
from dints_deploy.runtime.engine import choose_engine
from dints_deploy.runtime.evaluate import evaluate, unseen_cases
from dints_deploy.runtime.parity import run_windows
from dints_deploy.runtime.sessions import open_sessions

ENTRY = "hippocampus"


def test_every_shipped_entry_verifies() -> None:
    names = [path.parent.name for path in shipped_zoo().glob("*/entry.toml")]
    assert ENTRY in names
    for name in names:
        assert verify_entry(shipped_zoo() / name).spec.name == name


def test_entry_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in (shipped_zoo() / ENTRY).iterdir()) <= 16 * 2**20


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_scores_on_unseen_real_cases_equal_the_published_ones(engine: str, data: Path) -> None:
    entry = load_entry(ENTRY)
    metrics = json.loads((entry.folder / "metrics.json").read_text())
    assert metrics["onnx_sha256"] == {"model.onnx": entry.digests["model.onnx"]}
    cases = unseen_cases(read_dataset(data / "Task04_Hippocampus"), entry.spec, None)
    assert len(cases) == 6
    result = evaluate(cases, entry.spec, open_sessions(entry, windows=100, engine=engine))
    for case, scores in result.cases.items():
        published = metrics["cases"][case]
        for label in ("1", "2"):
            assert scores.dice[int(label)] == pytest.approx(published[label]["dice"], abs=2e-4)


def test_published_mean_dice_reaches_the_bar() -> None:
    metrics = json.loads((shipped_zoo() / ENTRY / "metrics.json").read_text())
    assert metrics["summary"]["cases"] == 42
    assert metrics["summary"]["mean"]["dice"] >= 0.891


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_engine_reproduces_the_reference_logits_on_real_windows(engine: str) -> None:
    entry = load_entry(ENTRY)
    inputs = np.load(entry.folder / "parity_inputs.npz", allow_pickle=False)
    chosen, _ = choose_engine(engine, windows=1)
    network = entry.member_bytes(entry.spec.members[0])
    session = chosen.open(network, window=entry.spec.window, batch=1, precision="fp32", why="test")
    logits = run_windows(session, inputs["windows"])
    assert np.abs(logits - inputs["logits0"]).max() <= 1e-3
    assert (logits.argmax(1) == inputs["logits0"].argmax(1)).mean() >= 0.9999
