"""The outputs of a case: a table from format to what writes it. A case's outputs are whole or absent."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dints_deploy.catalog.catalog import LoadedEntry
from dints_deploy.errors import OutputError, ScanRefused, UsageError
from dints_deploy.files import make_folder, output_error, replacing, sync_folder, write_text
from dints_deploy.imaging.nifti import read_nifti, write_nifti
from dints_deploy.process.source import Source
from dints_deploy.runtime.segment import Segmentation

if TYPE_CHECKING:
    from dints_deploy.dicom.result import DicomResult, SegmentationType
    from dints_deploy.dicom.series import Study


@dataclass(frozen=True, eq=False)
class Result:
    """Everything that an output may show.

    Attributes:
        when: date and time in DICOM objects.
        formats: all that are asked for: a measurement report refers to the SEG that is written beside it.
        supersedes: DICOM objects of the result that this one replaces.
    """

    stem: Path
    labels_path: Path | None
    entry: LoadedEntry
    source: Source
    segmentation: Segmentation
    record: dict[str, Any]
    when: datetime
    formats: tuple[str, ...]
    supersedes: tuple[Path, ...] = ()

    def path(self, suffix: str) -> Path:
        """Return the path of an output."""
        return self.stem.with_name(self.stem.name + suffix)

    @cached_property
    def dicom(self) -> DicomResult:
        """Return the mask on the planes of its source series, ready for DICOM objects.

        Raises:
            UsageError: `usage` where the source is no DICOM series.
        """
        if not self.source.dicom:
            raise UsageError("usage", "expected a DICOM source for DICOM outputs, found NIfTI: use --to nifti")
        from dints_deploy.dicom.instance import identify
        from dints_deploy.dicom.result import dicom_result

        kind: SegmentationType = "LABELMAP" if "dicom-labelmap" in self.formats else "BINARY"
        return dicom_result(
            list(self.source.dicom.values()),
            self.segmentation.labels,
            self.entry.spec,
            self.record,
            volumes_ml=self.segmentation.volumes_ml,
            when=self.when,
            segmentation_type=kind,
            supersedes=tuple(identify(path) for path in self.supersedes),
        )


def check_formats(formats: tuple[str, ...]) -> None:
    """Refuse an output format that is not known; raise `UsageError`."""
    if set(formats) >= SEG_FORMATS:
        raise UsageError("usage", "expected dicom-seg or dicom-labelmap, found both: they are two forms of one object")
    unknown = [name for name in formats if name not in OUTPUTS]
    if unknown or not formats:
        raise UsageError("usage", f"expected outputs of {', '.join(OUTPUTS)}, found {', '.join(unknown) or 'none'}")


def write_outputs(result: Result) -> dict[str, Path]:
    """Write every format asked for into a hidden folder, each checked there, then move all to their places.

    An earlier result stays until all of the new one is whole.

    Raises:
        OutputError: `output-selfcheck`, `output-object`, `output-unwritable`, `disk-full`.
    """
    folder = result.stem.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as hidden:
            labels_path = result.labels_path and Path(hidden) / result.labels_path.name
            staged = replace(result, stem=Path(hidden) / result.stem.name, labels_path=labels_path)
            written = {name: OUTPUTS[name](staged) for name in result.formats}
            places = {name: folder / path.name for name, path in written.items()}
            _check_places(places)
            for name, path in written.items():
                path.replace(places[name])
        sync_folder(folder)
    except OSError as error:
        raise output_error(folder, error) from error
    return places


def _check_places(places: dict[str, Path]) -> None:
    for path in places.values():
        if path.is_dir():
            raise OutputError("output-unwritable", f"expected to write {path}, found a folder there: choose another -o")


def write_refusal_report(studies: Sequence[Study], refusal: ScanRefused, stem: Path, when: datetime) -> Path:
    """Write "not processed because ..." as an SR in the study of the first series that has images.

    Raises:
        ScanRefused: `refusal` itself where no study has an image that a report could refer to.
        OutputError: the report cannot be written.
    """
    from dints_deploy.dicom.refusal import write_refusal
    from dints_deploy.runtime.report import software_version

    found = (one for study in studies for one in study.series if any(header.SOPInstanceUID for header in one.slices))
    series = next(found, None)
    if series is None:
        raise refusal
    path = make_folder(stem.parent) / f"{stem.name}.sr.dcm"
    return write_refusal(series, refusal, path, entry=None, software=software_version(), when=when)


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


def _seg(result: Result) -> Path:
    from dints_deploy.dicom.seg import write_seg

    return write_seg(result.dicom, result.path(".seg.dcm"))


def _sr(result: Result) -> Path:
    from dints_deploy.dicom.measure import write_sr

    return write_sr(result.dicom, result.path(".sr.dcm"), segmentation=bool(SEG_FORMATS & set(result.formats)))


def _rtstruct(result: Result) -> Path:
    from dints_deploy.dicom.rtstruct import write_rtstruct

    return write_rtstruct(result.dicom, result.path(".rtstruct.dcm"))


def _sc(result: Result) -> Path:
    from dints_deploy.dicom.capture import write_sc

    return write_sc(result.dicom, result.path(".sc.dcm"))


SEG_FORMATS: Final = {"dicom-seg", "dicom-labelmap"}
"""Two forms of one SEG: asked for both, `check_formats` refuses."""

OUTPUTS: Final[dict[str, Callable[[Result], Path]]] = {
    "nifti": _nifti,
    "dicom-seg": _seg,
    "dicom-labelmap": _seg,
    "dicom-sr": _sr,
    "rtstruct": _rtstruct,
    "dicom-sc": _sc,
    "preview": _preview,
    "html": _html,
}
"""Output format -> what writes it and returns its path."""
