"""Export a network for one engine, precision and device of this machine, and prove it before it is installed.

    proofs -> form (fp16, int8, plan) -> measure -> limits -> install

The reference on real windows is the entry's own: torch's fp32 logits in `parity_inputs.npz`. On hostile windows, and
for the time of a window, it is an fp32 engine of this machine.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from dints_deploy.catalog.catalog import LoadedEntry, runnable
from dints_deploy.catalog.dataset import Case
from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import EngineError, EntryError, UsageError
from dints_deploy.runtime.certificate import LocalCertificate, Target, install
from dints_deploy.runtime.certified import INPUTS_FILE
from dints_deploy.runtime.engine import (
    Batch,
    Session,
    available_threads,
    build_engine,
    check_precision,
    choose_engine,
)
from dints_deploy.runtime.evaluate import evaluate
from dints_deploy.runtime.int8_forms import Int8Form, int8_forms
from dints_deploy.runtime.machine import cpu_features, describe_device
from dints_deploy.runtime.parity import compare, exceeded, hostile_windows, limits_of, run_windows, stored_windows
from dints_deploy.runtime.report import software_version

TIMED_ROUNDS: Final = 5

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""


@dataclass(frozen=True, eq=False)
class Proof:
    """An fp32 network and what a form of it is proven with.

    Attributes:
        member: its file's name.
        onnx: the file.
        windows: real windows (N, C, I, J, K).
        logits: the reference's logits on them (N, classes, I, J, K).
    """

    member: str
    onnx: bytes
    windows: Batch
    logits: Batch

    @property
    def sha256(self) -> str:
        """Return the digest of the fp32 network."""
        return hashlib.sha256(self.onnx).hexdigest()

    @property
    def calibration(self) -> Batch:
        """Return the windows that int8 is calibrated on: two thirds, two at least; all of them prove it."""
        return self.windows[: max(2, 2 * len(self.windows) // 3)]


@dataclass(frozen=True, eq=False)
class Made:
    """A form of a network that kept its limits, not installed yet."""

    certificate: LocalCertificate
    artefact: bytes | None


def proofs_of(entry: LoadedEntry) -> list[Proof]:
    """Return the networks of an entry with its own parity windows.

    Raises:
        EntryError: `entry-missing-file` when it has none, `entry-invalid` when they are not those of its networks.
    """
    spec = runnable(entry).spec
    if INPUTS_FILE not in entry.digests:
        raise EntryError(
            "entry-missing-file", f"expected {INPUTS_FILE} in {spec.name} to measure parity on, found none: publish it"
        )
    windows, logits = stored_windows(entry)
    return [
        Proof(member.onnx, entry.member_bytes(member), windows, values)
        for member, values in zip(spec.members, logits, strict=True)
    ]


def export(
    spec: Entry,
    proofs: Sequence[Proof],
    target: Target,
    *,
    cases: Sequence[Case] = (),
    threads: int | None = None,
    progress: Progress = lambda stage, done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> list[Made]:
    """Make a form of every network of an entry and measure it; nothing is written.

    Args:
        spec: the entry.
        proofs: one per member.
        target: engine, precision and device.
        cases: labelled cases that the entry was not trained on, for the change of Dice.
        threads: CPU threads, None for all.
        progress: called now and then.
        note: called with what a person should know of the way to the result.

    Raises:
        UsageError: the engine has no such precision or device. EngineError: `parity-failed` with the figures, or what
            the engine says.
    """
    check_precision(target.engine, target.precision)
    attempt = partial(_export, spec, proofs, target, cases=cases, threads=threads, progress=progress)
    if target.precision != "int8":
        return attempt(form=None)
    return _within_limits(attempt, int8_forms(target.engine, cpu_features()), note)


def _within_limits(
    attempt: Callable[..., list[Made]], forms: Sequence[Int8Form], note: Callable[[str], None]
) -> list[Made]:
    """Return the first form that keeps the limits; raise `parity-failed` of the last that could be made and run."""
    form, *others = forms
    try:
        return attempt(form=form)
    except EngineError as error:
        if error.code != "parity-failed" or not others:
            raise
        missed = EngineError(error.code, error.message)  # without the frames, which hold the networks
    note(f"{missed.message}; trying again with more convolutions in floating point")
    try:
        return _within_limits(attempt, others, note)
    except EngineError as error:
        if error.code == "parity-failed":
            raise
        missed.add_note(f"with more of them: {error.message}")
        raise missed from error


def _export(
    spec: Entry,
    proofs: Sequence[Proof],
    target: Target,
    *,
    form: Int8Form | None,
    cases: Sequence[Case],
    threads: int | None,
    progress: Progress,
) -> list[Made]:
    """Make and measure one form of every network; arguments and errors are those of `export`."""
    engine, _ = choose_engine(target.engine, windows=1, device=target.device, threads=threads)
    another = "openvino" if target.engine == "openvino" and target.precision != "fp32" else "onnx"  # not with itself
    plain = build_engine(another, "cpu", threads or available_threads())
    artefacts, sessions, references, drafts = [], [], [], []
    for n, proof in enumerate(proofs):
        progress("make", n, len(proofs))
        artefact = make_form(proof, spec.window, target, progress, form)
        session = engine.open(
            artefact or proof.onnx, window=spec.window, batch=1, precision=target.precision, why="export"
        )
        reference = plain.open(proof.onnx, window=spec.window, batch=1, precision="fp32", why="reference")
        progress("measure", n, len(proofs))
        drafts.append(measure(proof, spec, target, session, reference))
        artefacts.append(artefact)
        sessions.append(session)
        references.append(reference)
    change = dice_change(spec, cases, sessions, references, target, progress) if cases else None
    made = []
    for draft, artefact in zip(drafts, artefacts, strict=True):
        digest = None if artefact is None else hashlib.sha256(artefact).hexdigest()
        fields = {"artefact_sha256": digest, "dice_change": change, "cases": len(cases)}
        made.append(Made(draft.model_copy(update=fields), artefact))
    return made


def make_form(
    proof: Proof, window: Sequence[int], target: Target, progress: Progress, form: Int8Form | None
) -> bytes | None:
    """Return what the engine is to run: a typed or quantised ONNX, or a plan; None for the fp32 ONNX as it is.

    int8 takes a `form`, other precisions none.

    Raises:
        UsageError: `extra-missing`. EngineError: it cannot be made.
    """
    typed = proof.onnx
    try:
        if target.precision == "fp16" and target.engine != "openvino":
            from dints_deploy.runtime.half import to_fp16

            typed = to_fp16(proof.onnx)
        elif target.precision == "int8":
            if form is None:
                raise ValueError("int8 takes a form")
            from dints_deploy.runtime.quantise import to_int8

            typed = to_int8(proof.onnx, proof.calibration, form)
    except ImportError as error:
        raise UsageError(
            "extra-missing", f"`export --precision {target.precision}` needs the package {error.name}: "
            "pip install 'dints-deploy[export]'"
        ) from error  # fmt: skip
    if target.engine == "tensorrt":
        from dints_deploy.runtime.tensorrt_build import build_plan

        return build_plan(typed, window, device=target.device, progress=progress)
    return None if typed is proof.onnx else typed


def measure(proof: Proof, spec: Entry, target: Target, session: Session, reference: Session) -> LocalCertificate:
    """Compare a session with the reference and time both.

    Raises:
        EngineError: `parity-failed`.
    """
    hostile = hostile_windows(proof.windows.shape[1:])
    harsh = run_windows(reference, hostile)
    comparison = compare(session, spec, proof.sha256, real=(proof.windows, proof.logits), hostile=(hostile, harsh))
    if misses := exceeded(comparison, spec):
        raise EngineError(
            "parity-failed",
            f"expected of {spec.name}/{proof.member}, {target}: {'; '.join(misses)}: not installed",
        )
    seconds = _seconds_per_window([session, reference], proof.windows[:1])
    beside = f"{reference.info.engine} {reference.info.version} fp32 on {reference.info.device}"
    return LocalCertificate(
        schema_version=2,
        entry=spec.name,
        member=proof.member,
        comparison=comparison,
        reference=f"the entry's logits; on hostile windows, and for the time, {beside}",
        kept=limits_of(target.precision, spec),
        machine=describe_device(target.device),
        artefact_sha256=None,
        dice_change=None,
        cases=0,
        seconds_per_window=seconds[0],
        fp32_seconds_per_window=seconds[1],
        software=software_version(),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _seconds_per_window(sessions: Sequence[Session], window: Batch) -> list[float]:
    """Return the shortest time of a window for each session; they take turns."""
    best = [float("inf")] * len(sessions)
    for _ in range(TIMED_ROUNDS):
        for n, session in enumerate(sessions):
            begin = time.perf_counter()
            session.result(session.submit(window))
            best[n] = min(best[n], time.perf_counter() - begin)
    return best


def dice_change(
    spec: Entry,
    cases: Sequence[Case],
    sessions: Sequence[Session],
    references: Sequence[Session],
    target: Target,
    progress: Progress,
) -> dict[str, float | None]:
    """Return by how much each label's mean Dice against the readers' labels changes from fp32 to this form.

    Raises:
        EngineError: `parity-failed` when it drops by more than the entry's limit.
    """
    total = 2 * len(cases)
    before = evaluate(cases, spec, references, progress=lambda done, _: progress("score fp32", done, total))
    after = evaluate(cases, spec, sessions, progress=lambda done, _: progress("score", len(cases) + done, total))
    changes: dict[str, float | None] = {}
    for label in spec.labels:
        old, new = before.summary.dice[label.value], after.summary.dice[label.value]
        changes[label.id] = None if old is None or new is None else new - old
    worst = min((change for change in changes.values() if change is not None), default=0.0)
    limit = spec.parity.reduced.max_dice_drop
    if not -worst <= limit:
        raise EngineError(
            "parity-failed",
            f"expected {target} of {spec.name} to lose at most {limit:g} Dice, found {-worst:.4f}: not installed",
        )
    return changes


def install_all(made: Sequence[Made]) -> list[Path]:
    """Install every form and return the certificates' paths; raises as `install`."""
    return [install(item.certificate, item.artefact) for item in made]
