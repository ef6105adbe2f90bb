"""The outputs of a case: a table from format to what writes it. A case's outputs are whole or absent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dints_deploy.catalog.catalog import LoadedEntry
from dints_deploy.errors import OutputError, UsageError
from dints_deploy.files import replacing, write_text
from dints_deploy.imaging.nifti import read_nifti, write_nifti
from dints_deploy.process.source import Source
from dints_deploy.runtime.segment import Segmentation


@dataclass(frozen=True, eq=False)
class Result:
    """Everything that an output may show."""

    stem: Path
    labels_path: Path | None
    entry: LoadedEntry
    source: Source
    segmentation: Segmentation
    record: dict[str, Any]

    def path(self, suffix: str) -> Path:
        """Return the path of an output."""
        return self.stem.with_name(self.stem.name + suffix)


def check_formats(formats: tuple[str, ...]) -> None:
    """Refuse an output format that is not known; raise `UsageError`."""
    unknown = [name for name in formats if name not in OUTPUTS]
    if unknown or not formats:
        raise UsageError("usage", f"expected outputs of {', '.join(OUTPUTS)}, found {', '.join(unknown) or 'none'}")


def write_outputs(result: Result, formats: tuple[str, ...]) -> dict[str, Path]:
    """Write every format; when one fails, remove those already written."""
    files: dict[str, Path] = {}
    with ExitStack() as undo:
        for name in formats:
            files[name] = OUTPUTS[name](result)
            undo.callback(files[name].unlink, missing_ok=True)
        undo.pop_all()
    return files


def _nifti(result: Result) -> Path:
    """Write the label map and read it back: same grid, same voxels, or no file."""
    path = result.labels_path or result.path(".nii.gz")
    labels = result.segmentation.labels
    write_nifti(path, labels)
    written = read_nifti(path)
    if not written.grid.same_as(labels.grid) or not np.array_equal(written.data, labels.data):
        path.unlink(missing_ok=True)
        raise OutputError("output-selfcheck", f"expected {path} to read back as the mask that was computed: run again")
    return path


def _preview(result: Result) -> Path:
    from dints_deploy.runtime.preview import render

    path, spec = result.path(".png"), result.entry.spec
    columns = [("image", None), ("prediction", result.segmentation.labels)]
    sheet = render(result.source.scan, columns, spec, f"{spec.name} {spec.version}")
    with replacing(path) as partial:
        sheet.save(partial)
    return path


def _html(result: Result) -> Path:
    from dints_deploy.runtime.page import render_page
    from dints_deploy.runtime.preview import PLANES, picture

    path, spec, labels = result.path(".html"), result.entry.spec, result.segmentation.labels
    scan = result.source.scan
    pictures = [(plane.name, picture(scan, labels, spec, plane, middle_of=labels)) for plane in PLANES]
    write_text(path, render_page(result.record, spec, pictures))
    return path


OUTPUTS: Final[dict[str, Callable[[Result], Path]]] = {"nifti": _nifti, "preview": _preview, "html": _html}
"""Output format -> what writes it and returns its path."""
