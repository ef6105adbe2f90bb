"""Write a refusal as a structured report: "not processed because ...", so that silence never reads as "no finding"."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydicom.dataset import Dataset

from dints_deploy.catalog.entry import RESEARCH_USE, Entry
from dints_deploy.dicom.bounded import read_header
from dints_deploy.dicom.measure import evidence_item, observation_context
from dints_deploy.dicom.objects import building, encoded, identify, write_checked
from dints_deploy.dicom.provenance import SOFTWARE, Provenance
from dints_deploy.dicom.result import in_zone_of
from dints_deploy.dicom.selfcheck import check_values
from dints_deploy.dicom.series import Series
from dints_deploy.dicom.uid import derived_uid
from dints_deploy.errors import REASONS, DintsError, OutputError

if TYPE_CHECKING:
    from highdicom.sr import ContainerContentItem

SCHEME: Final = "99DINTS"
"""Private codes, for what no public dictionary has."""

NOT_PROCESSED: Final = ("not-processed", SCHEME, "Not processed by the algorithm")
REASON: Final = ("reason-code", SCHEME, "Reason code")


def write_refusal(
    series: Series, error: DintsError, path: Path, *, entry: Entry | None, software: str, when: datetime
) -> Path:
    """Write why a series was not processed, in the source's study.

    Args:
        series: that was refused; its images are listed as evidence.
        error: code and sentence, which hold no identifiers.
        entry: that would have run; None where none was chosen.
        software: version of dints-deploy.
        when: date and time of the object.

    Raises:
        OutputError: `output-object` where the source has no image to refer to; `output-selfcheck`,
            `output-unwritable`, `disk-full`.
    """
    if not any(one.SOPInstanceUID for one in series.slices):
        raise OutputError("output-object", "expected images that the report can refer to, found none: no report")
    with building("SR"):
        report = build_refusal(series, error, entry=entry, software=software, when=when)
        data = encoded(report)
    return write_checked(path, data, lambda written: check_values(written, report, "SR"))


def build_refusal(series: Series, error: DintsError, *, entry: Entry | None, software: str, when: datetime) -> Dataset:
    """Return the Enhanced SR (PS3.3 A.35.2) of a refusal."""
    from highdicom.sr import EnhancedSR

    name, version = (entry.name, entry.version) if entry else (SOFTWARE, software)
    provenance = Provenance(entry=name, version=version, software=software)
    instances = dict.fromkeys((one.SOPClassUID, one.SOPInstanceUID) for one in series.slices if one.SOPInstanceUID)
    first = min(uid for _, uid in instances)
    parts = ("refusal", provenance.identity, error.code, error.message, *sorted(uid for _, uid in instances))
    study = series.StudyInstanceUID or derived_uid("study", first)
    source = series.SeriesInstanceUID or derived_uid("series", first)
    report: Dataset = EnhancedSR(
        evidence=[evidence_item(*instance, series=source, study=study) for instance in instances],
        content=_content(error, entry, provenance),
        series_instance_uid=derived_uid(*parts, "series"),
        series_number=1,
        sop_instance_uid=derived_uid(*parts, "instance"),
        instance_number=1,
        manufacturer=SOFTWARE,
        is_complete=True,
    )
    header = read_header(series.slices[0].path).dataset
    when = in_zone_of(header, when)
    report.ContentDate, report.ContentTime = when.strftime("%Y%m%d"), when.strftime("%H%M%S")
    identify(
        report,
        header=header,
        entry=entry,
        provenance=provenance,
        when=when,
        kind="refusal",
        description="Not processed",
        uids=(study, derived_uid(*parts, "series"), derived_uid(*parts, "instance")),
    )
    return report


def _content(error: DintsError, entry: Entry | None, provenance: Provenance) -> ContainerContentItem:
    """Return the content tree: who observed, the reason's code, its meaning, the sentence, the research-use line."""
    from highdicom.sr import ContainerContentItem, ContentSequence, RelationshipTypeValues, TextContentItem
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    research = entry.research_use if entry else RESEARCH_USE
    texts = (
        (Code(*REASON[:2], REASON[2]), error.code),
        (codes.DCM.Finding, f"Not processed because {REASONS[error.code]}: {error.message}"),
        (codes.DCM.Comment, research),
    )
    root = ContainerContentItem(name=Code(*NOT_PROCESSED[:2], NOT_PROCESSED[2]), is_content_continuous=False)
    root.ContentSequence = ContentSequence(is_root=False)
    root.ContentSequence.extend(observation_context(provenance.entry, provenance.software))
    for name, text in texts:
        item = TextContentItem(name=name, value=text, relationship_type=RelationshipTypeValues.CONTAINS)
        root.ContentSequence.append(item)
    return root
