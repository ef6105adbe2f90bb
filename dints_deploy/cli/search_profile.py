"""`dints-deploy search profile`: what genotypes' networks cost, one table for all, like the paper's Table 1."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dints_deploy.catalog.catalog import load_entry
from dints_deploy.cli.console import JsonOption, failing, progress, say, say_json
from dints_deploy.cli.extra import needs_search_extra
from dints_deploy.errors import UsageError

if TYPE_CHECKING:
    from dints_search.cost import Setting
    from dints_search.genotype import Genotype


def profile_command(
    genotype: Annotated[list[str], typer.Argument(help="genotype.json files, or names of zoo entries.")],
    size: Annotated[str, typer.Option(metavar="I,J,K", help="Voxels of a window, multiples of 2^D.")] = "96,96,96",
    channels: Annotated[int, typer.Option(min=1, help="Channels of the scan.")] = 1,
    classes: Annotated[int, typer.Option(min=1, help="Classes, background included.")] = 3,
    width: Annotated[float, typer.Option(min=1 / 32, help="Channel multiplier.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Timed forward passes; 0 counts and measures nothing.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Print parameters, multiply-adds, saved activations, measured training memory and forward time.

    Example: dints-deploy search profile dints-cvpr2021-pancreas --size 96,96,96 --repeats 0
    """
    with failing(as_json):
        with needs_search_extra("search profile"):
            import torch

            from dints_search.cost import Setting
            from dints_search.fits import check_device
            from dints_search.space import SearchSpace
        if threads is not None:
            torch.set_num_threads(threads)
        check_device(device)
        found = [(name, _genotype(name)) for name in genotype]
        setting = Setting(SearchSpace(), _sizes(size, found), channels, classes, width, batch)
        rows = []
        with progress("profile") as bar:
            for number, (name, each) in enumerate(found, start=1):
                rows.append(_profile(name, each, setting, device, repeats))
                bar(number, len(found))
        if as_json:
            about = {"size": list(setting.size), "channels": channels, "classes": classes, "width": width}
            say_json({**about, "batch": batch, "device": device, "threads": torch.get_num_threads(), "networks": rows})
        else:
            _show(rows, setting, f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else device)


def _genotype(name: str) -> Genotype:
    """Return the genotype of a file, or of a zoo entry."""
    from dints_search.genotype import parse_genotype, read_genotype

    if name.endswith(".json") or Path(name).is_file():
        return read_genotype(Path(name))
    entry = load_entry(name)
    if entry.spec.genotype is None:
        raise UsageError("usage", f"expected an entry with a genotype, {name} has none: give a genotype.json")
    return parse_genotype((entry.folder / entry.spec.genotype).read_text(encoding="utf-8"))


def _sizes(text: str, found: list[tuple[str, Genotype]]) -> tuple[int, int, int]:
    """Return the window, which every genotype's levels must be able to halve."""
    multiple = 2 ** max(genotype.num_depths for _, genotype in found)
    try:
        i, j, k = (int(n) for n in text.split(","))
    except ValueError as fault:
        raise UsageError("usage", f"expected --size I,J,K, found {text!r}") from fault
    if any(n < multiple or n % multiple for n in (i, j, k)) or max(i, j, k) == multiple:
        raise UsageError(
            "usage", f"expected --size of multiples of {multiple}, one of them {2 * multiple} or more, found {text}"
        )
    return i, j, k


def _profile(name: str, genotype: Genotype, setting: Setting, device: str, repeats: int) -> dict[str, Any]:
    from dints_search.profile import count, measure

    row: dict[str, Any] = {"name": name, "digest": genotype.digest(), "edges": sum(map(sum, genotype.edge_active))}
    row |= asdict(count(genotype, setting))
    if repeats:
        row |= asdict(measure(genotype, setting, device=device, repeats=repeats))
    return row


def _show(rows: list[dict[str, Any]], setting: Setting, where: str) -> None:
    from rich.table import Table

    window = "x".join(str(n) for n in setting.size)
    title = (
        f"window {window}, batch {setting.batch}, {setting.in_channels} channels, {setting.num_classes} classes, "
        f"channel multiplier {setting.channel_multiplier:g}"
    )
    table = Table(
        title=title, caption=f"in brackets: the published form, idle stems included; measured in fp32 on {where}"
    )
    table.add_column("network", overflow="fold")
    for column in ("edges", "params M", "GMAC", "saved\nMiB", "step\nMiB", "forward\nms"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["edges"]),
            f"{row['parameters'] / 1e6:.2f}\n({row['compatible_parameters'] / 1e6:.2f})",
            f"{row['gmac']:.2f}\n({row['compatible_gmac']:.2f})",
            f"{row['saved_mib']:.0f}",
            f"{row['step_mib']:.0f}" if "step_mib" in row else "-",
            f"{1000 * row['forward_s']:.0f}" if "forward_s" in row else "-",
        )
    say(table)
