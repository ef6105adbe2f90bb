"""Parity: how far an engine's logits are from the reference's, on real windows and on hostile ones.

`parity.json` of an entry is its certificate for fp32 engines on a CPU; it counts for exactly these ONNX files and
engines of the same major version. The entry's `parity_inputs.npz` holds the real windows and the
reference's logits on them.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dints_deploy.catalog.catalog import LoadedEntry
from dints_deploy.catalog.entry import Entry
from dints_deploy.catalog.strict import Strict, read_json
from dints_deploy.errors import EntryError
from dints_deploy.runtime.certified import INPUTS_FILE
from dints_deploy.runtime.engine import COMPILED, Batch, Session, SessionInfo
from dints_deploy.runtime.metrics import dice
from dints_deploy.runtime.restore import decision

PARITY_FILE = "parity.json"


class Comparison(Strict):
    """One engine against the reference.

    Attributes:
        onnx_sha256: of the network that was run.
        windows: real windows compared.
        max_abs_logit, mean_abs_logit: over all logits of the real windows.
        label_agreement: share of voxels with the same label.
        dice: label id -> Dice between the two label maps; None where neither has the label.
        hostile_max_abs_logit, hostile_label_agreement: the same on hostile windows, where a constant input makes
            normalisation amplify rounding: the logits are for the record, the labels must agree.
    """

    onnx_sha256: str
    engine: str
    version: str
    device: str
    precision: str
    windows: int
    max_abs_logit: float
    mean_abs_logit: float
    label_agreement: float
    dice: dict[str, float | None]
    hostile_max_abs_logit: float
    hostile_label_agreement: float


class Certificate(Strict):
    """The content of `parity.json`."""

    schema_version: Literal[1]
    reference: str
    comparisons: tuple[Comparison, ...]

    def covers(self, onnx_sha256: str, info: SessionInfo) -> bool:
        """Say whether the certificate holds for this network on this engine: same bytes, same major version."""
        return any(
            c.onnx_sha256 == onnx_sha256
            and (c.engine, c.device, c.precision) == (info.engine, info.device, info.precision)
            and _major(c.version) == _major(info.version)
            for c in self.comparisons
        )


def _major(version: str) -> str:
    return version.partition(".")[0]


def hostile_windows(shape: Sequence[int]) -> Batch:
    """Return windows that break careless engines: air, a constant, a clipped bright block. (N, C, I, J, K)."""
    air = np.zeros(shape, np.float32)
    constant = np.full(shape, 1.0, np.float32)
    metal = np.full(shape, -1.0, np.float32)
    metal[..., : shape[-3] // 3, : shape[-2] // 3, : shape[-1] // 3] = 30.0
    return np.stack([air, constant, metal])


def run_windows(session: Session, windows: Batch) -> Batch:
    """Return the session's logits of windows (N, C, I, J, K), one at a time."""
    return np.concatenate([session.result(session.submit(window[np.newaxis])) for window in windows])


def compare(
    session: Session, spec: Entry, onnx_sha256: str, *, real: tuple[Batch, Batch], hostile: tuple[Batch, Batch]
) -> Comparison:
    """Measure a session against the reference.

    Args:
        session: of the engine.
        spec: the entry, for labels.
        onnx_sha256: of the network that the session runs.
        real: windows (N, C, I, J, K) of scans, and the reference's logits (N, classes, I, J, K) on them.
        hostile: the same for hostile windows.
    """
    logits, harsh = run_windows(session, real[0]), run_windows(session, hostile[0])
    difference = np.abs(logits.astype(np.float64) - real[1])
    ours, theirs = _labels(logits, spec), _labels(real[1], spec)
    return Comparison(
        onnx_sha256=onnx_sha256,
        engine=session.info.engine,
        version=session.info.version,
        device=session.info.device,
        precision=session.info.precision,
        windows=len(logits),
        max_abs_logit=float(difference.max()),
        mean_abs_logit=float(difference.mean()),
        label_agreement=float((ours == theirs).mean()),
        dice={label.id: dice(ours == label.value, theirs == label.value) for label in spec.labels},
        hostile_max_abs_logit=float(np.abs(harsh.astype(np.float64) - hostile[1]).max()),
        hostile_label_agreement=float((_labels(harsh, spec) == _labels(hostile[1], spec)).mean()),
    )


def stored_windows(entry: LoadedEntry, count: int | None = None) -> tuple[Batch, list[Batch]]:
    """Return an entry's real windows (N, C, I, J, K), the first `count` or all, and the reference's logits per member.

    Raises:
        EntryError: `entry-invalid` when they cannot be read, there are none, or they are not those of its networks.
    """
    spec = entry.spec
    names = ["windows", *(f"logits{n}" for n in range(len(spec.members)))]
    try:
        with (entry.folder / INPUTS_FILE).open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            windows, *logits = [stored[name][:count].astype(np.float32) for name in names]
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as fault:
        raise EntryError("entry-invalid", f"expected windows and logits in {INPUTS_FILE}, found: {fault}") from fault
    shape, wanted = windows.shape[1:], (len(spec.channels), *spec.window)
    expected = (len(windows), spec.outputs, *spec.window)
    if not len(windows) or shape != wanted or any(values.shape != expected for values in logits):
        raise EntryError("entry-invalid", f"expected windows {wanted} in {INPUTS_FILE}, found {windows.shape}")
    return windows, logits


def misses_on(session: Session, spec: Entry, windows: Batch, reference: Batch) -> list[str]:
    """Return what a session misses of the entry's fp32 limits on real windows, one phrase each; NaN misses all."""
    logits = run_windows(session, windows)
    measured = {
        "max_abs_logit": float(np.abs(logits.astype(np.float64) - reference).max()),
        "min_label_agreement": float((_labels(logits, spec) == _labels(reference, spec)).mean()),
    }
    return _missed(measured, limits_of("fp32", spec))


def _labels(logits: Batch, spec: Entry) -> NDArray[Any]:
    """Return the label maps of windows, one after the other: (N * I, J, K)."""
    decide = decision(spec)
    return np.concatenate([decide(window) for window in logits])


def within(comparison: Comparison, spec: Entry) -> bool:
    """Say whether a comparison keeps the entry's limits; NaN does not."""
    return not exceeded(comparison, spec)


def exceeded(comparison: Comparison, spec: Entry) -> list[str]:
    """Return what a comparison misses of the entry's limits, one phrase each; NaN misses every limit."""
    limits = limits_of(comparison.precision, spec)
    worst = min((score for score in comparison.dice.values() if score is not None), default=1.0)
    measured = {
        "max_abs_logit": comparison.max_abs_logit,
        "min_label_agreement": comparison.label_agreement,
        "min_dice": worst,
        "min_hostile_label_agreement": comparison.hostile_label_agreement,
    }
    return _missed(measured, limits)


def _missed(measured: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    return [
        f"{name} of {limits[name]:g}, found {value:.6g}"
        for name, value in measured.items()
        if name in limits and not (value <= limits[name] if name.startswith("max_") else value >= limits[name])
    ]


def limits_of(precision: str, spec: Entry) -> dict[str, float]:
    """Return the limits that hold for a precision, by name: of logits and labels for fp32, of labels for the others."""
    limits = spec.parity
    if precision == "fp32":
        agreement = limits.min_label_agreement
        return {
            "max_abs_logit": limits.max_abs_logit,
            "min_label_agreement": agreement,
            "min_hostile_label_agreement": agreement,
        }
    return limits.reduced.model_dump()


def parity_status(entry: LoadedEntry, info: SessionInfo) -> str:
    """Say in a few words whether the entry's certificate covers what runs, for the report.

    Raises:
        EntryError: `entry-invalid` when the certificate cannot be read.
    """
    if info.precision != "fp32" or info.engine in COMPILED:
        return "certified on this machine"  # nothing else runs: see `certified`
    if PARITY_FILE not in entry.digests:
        return "no certificate in the entry"
    certificate = read_json(entry.folder / PARITY_FILE, Certificate, EntryError, "entry-invalid")
    weights = [entry.digests[member.onnx] for member in entry.spec.members]
    if all(certificate.covers(digest, info) for digest in weights):
        told = "; rewritten here, and compared on its first window" if info.products_saved else ""
        return f"certified by the entry{told}"
    return f"not certified for {info.engine} {info.version} at {info.precision} on {info.device}"
