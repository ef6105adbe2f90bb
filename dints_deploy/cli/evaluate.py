"""`dints-deploy evaluate`: Dice and NSD of an entry, or of a training run, on labelled cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dints_deploy.catalog.catalog import load_entry
from dints_deploy.catalog.dataset import read_dataset, read_unlabelled
from dints_deploy.catalog.entry import Entry
from dints_deploy.cli.console import JsonOption, failing, progress, say, say_json
from dints_deploy.cli.extra import needs_search_extra
from dints_deploy.errors import UsageError
from dints_deploy.files import replacing, write_text
from dints_deploy.runtime.evaluate import Evaluation, check_labels, evaluate, unseen_cases
from dints_deploy.runtime.sessions import open_sessions

MANY_WINDOWS = 1_000
"""An evaluation runs many windows: `auto` chooses for throughput."""


def evaluate_command(
    data: Annotated[Path, typer.Option(help="A folder in MSD layout (dataset.json, imagesTr, labelsTr).")],
    model: Annotated[str | None, typer.Option(help="Zoo entry.")] = None,
    run: Annotated[Path | None, typer.Option(help="A training run's folder, instead of --model (needs torch).")] = None,
    fold: Annotated[
        int | None,
        typer.Option(help="Validation part of fold 0..4; without it all unseen cases, with --run its own fold's."),
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, openvino or onnx.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32; others need a local parity certificate.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="With --run: cpu or cuda:N; cpu by default.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the JSON here too.")] = None,
    submission: Annotated[
        Path | None, typer.Option(help="Predict the task's unlabelled cases instead and pack them: .zip or .tar.gz.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the scores of all cases to this PNG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure Dice and surface Dice (NSD) on labelled cases that the network was not trained on.

    Example: dints-deploy evaluate --model hippocampus --data Task04_Hippocampus --fold 0
    """
    with failing(as_json):
        if (model is None) == (run is None):
            raise UsageError("usage", "expected --model ENTRY or --run RUN, one of the two")
        if device is not None and run is None:
            raise UsageError("usage", "expected --device with --run RUN: an entry is measured on the CPU")
        if run is not None and (engine, precision) != ("auto", "fp32"):
            raise UsageError(
                "usage", "expected --engine and --precision with --model: a run is measured with torch, fp32"
            )
        if submission is not None and any(given is not None for given in (fold, output, plot)):
            raise UsageError(
                "usage", "expected --submission without --fold, -o and --plot: its cases have no labels here"
            )
        place = device or "cpu"
        if submission is not None:
            _submit(submission, model, run, data, engine, precision, place, as_json=as_json)
            return
        if model is not None:
            spec, result, about = _entry(model, data, fold, engine, precision)
        else:
            spec, result, about = _run(run, data, fold, place)
        if plot is not None:
            _plot(plot, spec, result)
        document = {**about, **result.as_dict()}
        if output is not None:
            write_text(output, json.dumps(document, indent=2) + "\n")
        say_json(document) if as_json else _show(spec, result, about)


def _entry(
    model: str, data: Path, fold: int | None, engine: str, precision: str
) -> tuple[Entry, Evaluation, dict[str, Any]]:
    entry = load_entry(model)
    dataset = read_dataset(data)
    check_labels(dataset, entry.spec)
    cases = unseen_cases(dataset, entry.spec, fold)
    sessions = open_sessions(entry, windows=MANY_WINDOWS, engine=engine, precision=precision)
    with progress("evaluate") as report:
        result = evaluate(cases, entry.spec, sessions, progress=report)
    info = sessions[0].info
    weights = {member.onnx: entry.digests[member.onnx] for member in entry.spec.members}
    about = {"entry": entry.spec.name, "version": entry.spec.version, "onnx_sha256": weights}
    return entry.spec, result, {**about, "engine": info.engine, "precision": info.precision, "fold": fold}


def _run(run: Path | None, data: Path, fold: int | None, device: str) -> tuple[Entry, Evaluation, dict[str, Any]]:
    with needs_search_extra("evaluate --run"):
        from dints_search.evaluate import evaluate_run
    if run is None:
        raise UsageError("usage", "expected --run RUN")
    with progress("evaluate") as report:
        spec, result = evaluate_run(run, read_dataset(data), fold, device=device, progress=report)
    if fold is None and spec.training is not None:
        fold = spec.training.fold
    return spec, result, {"run": str(run), "engine": "torch", "precision": "fp32", "device": device, "fold": fold}


def _submit(
    out: Path,
    model: str | None,
    run: Path | None,
    data: Path,
    engine: str,
    precision: str,
    device: str,
    *,
    as_json: bool,
) -> None:
    """Pack the predictions of the cases whose labels a leaderboard keeps."""
    from dints_deploy.runtime.submission import check_archive_name, submit

    check_archive_name(out)
    cases = read_unlabelled(data)
    if model is not None:
        entry = load_entry(model)
        spec = entry.spec
        sessions = open_sessions(entry, windows=MANY_WINDOWS, engine=engine, precision=precision)
    else:
        with needs_search_extra("evaluate --run"):
            from dints_search.evaluate import open_run_sessions
        spec, sessions = open_run_sessions(run or Path(), device=device)
    task = spec.training.task if spec.training else data.resolve().name
    with progress("submission") as report:
        submit(cases, spec, sessions, task, out, progress=report)
    document = {"submission": str(out), "task": task, "cases": len(cases)}
    say_json(document) if as_json else say(f"packed {len(cases)} cases of {task} into {out}. Research use only.")


def _plot(path: Path, spec: Entry, result: Evaluation) -> None:
    from dints_deploy.runtime.plot import draw_scores

    with replacing(path) as partial:
        draw_scores(result, spec, f"{spec.name}, {result.summary.cases} cases").save(partial)


def _show(spec: Entry, result: Evaluation, about: dict[str, Any]) -> None:
    summary = result.summary
    from rich.table import Table

    about_text = " ".join(str(value) for value in about.values() if isinstance(value, str))
    table = Table("structure", "Dice", "NSD", "left out", title=about_text)
    for label in spec.labels:
        dice, nsd = summary.dice[label.value], summary.nsd[label.value]
        tolerance = f" at {label.nsd_tolerance:g} mm"
        table.add_row(label.name, _number(dice), _number(nsd) + tolerance, str(summary.left_out[label.value]))
    table.add_row("mean", _number(summary.mean_dice), _number(summary.mean_nsd), "")
    say(table)
    worst = min(
        result.cases, key=lambda case: min(d for d in (*result.cases[case].dice.values(), 2.0) if d is not None)
    )
    say(f"{summary.cases} cases; the lowest Dice is in {worst}. Research use only.")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
