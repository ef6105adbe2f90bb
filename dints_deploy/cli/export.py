"""`dints-deploy export`: an entry's or a run's network in the form of an engine, with its parity proven."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dints_deploy.catalog.catalog import LoadedEntry, runnable, verify_entry
from dints_deploy.catalog.dataset import Case, Dataset, read_dataset
from dints_deploy.catalog.entry import Entry
from dints_deploy.cli.console import JsonOption, failing, progress, say, say_json, say_note
from dints_deploy.cli.extra import needs_search_extra
from dints_deploy.errors import UsageError
from dints_deploy.files import make_folder, replacing, write_bytes

if TYPE_CHECKING:
    from dints_deploy.runtime.certificate import LocalCertificate, Target
    from dints_deploy.runtime.export import Made, Progress

ENGINES: Final = {"--onnx": "onnx", "--openvino": "openvino", "--trt": "tensorrt", "--onnx-trt": "onnx-trt"}


def export_command(
    entry: Annotated[str | None, typer.Argument(help="Zoo entry whose networks are exported.")] = None,
    run: Annotated[Path | None, typer.Option(help="A finished training run, instead of ENTRY (needs torch).")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A task folder: of ENTRY, to measure the change of Dice on; of RUN, that it was trained on."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for copies of the files.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX; also for ONNX Runtime.")] = False,
    openvino: Annotated[bool, typer.Option("--openvino", help="For OpenVINO.")] = False,
    trt: Annotated[bool, typer.Option("--trt", help="A TensorRT plan for this GPU.")] = False,
    onnx_trt: Annotated[bool, typer.Option("--onnx-trt", help="For ONNX Runtime's TensorRT provider.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16 or int8.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda:N; cuda:0 for --trt.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a network ready for an engine of this machine, and prove it: what misses the entry's limits is not kept.

    `segment --engine ... --precision ...` then uses it. --onnx alone writes the fp32 ONNX files as they are.

    Example: dints-deploy export hippocampus --openvino --precision int8 --data Task04_Hippocampus
    """
    with failing(as_json):
        chosen = [ENGINES[flag] for flag, given in zip(ENGINES, (onnx, openvino, trt, onnx_trt), strict=True) if given]
        if len(chosen) != 1:
            raise UsageError("usage", f"expected one of {', '.join(ENGINES)}, found {len(chosen)}")
        if (entry is None) == (run is None):
            raise UsageError("usage", "expected ENTRY or --run RUN, one of the two")
        from dints_deploy.runtime.certificate import Target

        where = device or ("cpu" if chosen[0] in ("onnx", "openvino") else "cuda:0")
        target = Target(engine=chosen[0], precision=precision, device=where)
        plain = (target.engine, precision, where) == ("onnx", "fp32", "cpu")
        if run is not None:
            said = _export_run(run, data, out or Path(), target, threads, plain=plain)
        elif plain:
            said = {"files": _copy_entry(entry or "", out or Path())}
        else:
            said = _export_entry(verify_entry(entry or ""), data, out, target, threads)
        _show(said, as_json)


def _copy_entry(name: str, out: Path) -> list[Path]:
    entry = runnable(verify_entry(name))
    make_folder(out)
    files = []
    for member in entry.spec.members:
        path = out / f"{entry.spec.name}-{member.onnx.replace('/', '-')}"
        with replacing(path) as partial:
            shutil.copyfile(entry.folder / member.onnx, partial)
        files.append(path)
    return files


def _export_entry(
    entry: LoadedEntry, data: Path | None, out: Path | None, target: Target, threads: int | None
) -> dict[str, Any]:
    from dints_deploy.runtime.export import export, install_all, proofs_of

    with _steps(f"{entry.spec.name}, {target}") as report:
        proofs = proofs_of(entry)
        cases = _unseen(entry.spec, read_dataset(data)) if data else ()
        made = export(entry.spec, proofs, target, cases=cases, threads=threads, progress=report, note=say_note)
    copies = _copies(made, out, entry.spec.name) if out else []
    return {"files": copies, "certificates": install_all(made), "measured": [item.certificate for item in made]}


def _unseen(spec: Entry, dataset: Dataset) -> tuple[Case, ...]:
    """Return the labelled cases that the networks were not trained on."""
    from dints_deploy.runtime.evaluate import check_labels, unseen_cases

    check_labels(dataset, spec)
    return unseen_cases(dataset, spec, None)


def _export_run(
    run: Path, data: Path | None, out: Path, target: Target, threads: int | None, *, plain: bool
) -> dict[str, Any]:
    with needs_search_extra("export --run"):
        from dints_search.export import export_run, run_proof
    if data is None:
        raise UsageError("usage", "expected --run RUN with --data DIR: parity is measured on real windows")
    dataset = read_dataset(data)
    if plain:
        return {"files": export_run(run, dataset, make_folder(out))}
    from dints_deploy.runtime.export import export, install_all

    with _steps(f"{run.name}, {target}") as report:
        spec, proof = run_proof(run, dataset)
        folded = spec.training is not None and spec.training.fold is not None  # a run on everything saw all cases
        unseen = _unseen(spec, dataset) if folded else ()
        made = export(spec, [proof], target, cases=unseen, threads=threads, progress=report, note=say_note)
    copies = _copies(made, out, run.name)
    return {"files": copies, "certificates": install_all(made), "measured": [item.certificate for item in made]}


def _copies(made: list[Made], out: Path, name: str) -> list[Path]:
    """Write copies of the ONNX files to a folder; a plan is for this machine's state folder only."""
    make_folder(out)
    files = []
    for item in made:
        certificate = item.certificate
        if item.artefact is None or certificate.comparison.engine == "tensorrt":
            continue
        member = certificate.member.replace("/", "-").removesuffix(".onnx")
        files.append(out / f"{name}-{member}-{certificate.comparison.engine}-{certificate.comparison.precision}.onnx")
        write_bytes(files[-1], item.artefact)
    return files


@contextmanager
def _steps(title: str) -> Iterator[Progress]:
    with progress(title) as report:
        yield lambda stage, done, total: report(done, total)


def _show(said: dict[str, Any], as_json: bool) -> None:
    measured: list[LocalCertificate] = said.get("measured", [])
    if as_json:
        said = {name: [str(path) for path in paths] for name, paths in said.items() if name != "measured"}
        say_json(said | ({"measured": [item.model_dump(mode="json") for item in measured]} if measured else {}))
        return
    for item in measured:
        for line in _lines(item):
            say(line)
    for path in (*said["files"], *said.get("certificates", ())):
        say(str(path))


def _lines(item: LocalCertificate) -> Iterator[str]:
    shown = item.comparison
    ratio = item.fp32_seconds_per_window / item.seconds_per_window
    yield f"{item.entry}/{item.member}: {item.target}, {shown.engine} {shown.version}"
    yield (
        f"  labels equal in {shown.label_agreement:.4%}, on hostile windows in {shown.hostile_label_agreement:.2%}; "
        f"logits off by {shown.mean_abs_logit:.2g} on average, {shown.max_abs_logit:.2g} at most"
    )
    for label, score in shown.dice.items():
        change = (item.dice_change or {}).get(label)
        readers = "" if change is None else f", against the readers {change:+.4f} over {item.cases} cases"
        yield f"  {label}: Dice between the two {'none' if score is None else f'{score:.4f}'}{readers}"
    yield f"  {item.seconds_per_window:.3g} s a window, {ratio:.2f} times as fast as {item.reference.split(', ')[-1]}"
    if ratio < 1:
        yield "  slower than fp32 on this machine"
