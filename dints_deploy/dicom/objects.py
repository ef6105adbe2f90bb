"""What all written objects share: patient and study of the source, dates, UIDs, equipment; and how a file appears.

No exception text of a library leaves this module: it may quote a patient's name.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Final

from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dints_deploy.catalog.entry import Code, Entry
from dints_deploy.dicom.bounded import INVALID_FILE, quiet
from dints_deploy.dicom.provenance import SOFTWARE, Provenance, content_digest, equipment
from dints_deploy.dicom.result import DicomResult
from dints_deploy.dicom.uid import derived_uid
from dints_deploy.errors import OutputError
from dints_deploy.files import replacing

RESEARCH: Final = "research use only"
CONTENT_DESCRIPTION: Final = "Research use only. Not for diagnosis or treatment."
"""For Content Description, a long string of at most 64 characters (PS3.5 6.2, LO)."""

SUPERSEDING: Final = "Research use only. Supersedes an earlier segmentation."
"""The same for a SEG that replaces another, as more slices came; its report names the earlier report."""

LONG_STRING: Final = 64

EMPTY_WHEN_MISSING: Final = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber",
    "StudyID", "ReferringPhysicianName",
)  # fmt: skip
"""Type 2 attributes of the Patient and General Study modules: present, possibly empty."""

COPIED: Final = (
    # Patient (PS3.3 C.7.1.1)
    "PatientName", "PatientID", "IssuerOfPatientID", "TypeOfPatientID", "IssuerOfPatientIDQualifiersSequence",
    "PatientBirthDate", "PatientBirthTime", "PatientSex", "OtherPatientIDsSequence", "OtherPatientNames", "EthnicGroup",
    "PatientComments", "PatientSpeciesDescription", "PatientSpeciesCodeSequence", "PatientBreedDescription",
    "PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence",
    # Clinical Trial Subject and Study (C.7.1.3, C.7.2.3)
    "ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName", "ClinicalTrialSiteID",
    "ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID", "ClinicalTrialTimePointID",
    "ClinicalTrialTimePointDescription",
    # General Study (C.7.2.1)
    "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber",
    "IssuerOfAccessionNumberSequence", "StudyDescription", "PhysiciansOfRecord", "NameOfPhysiciansReadingStudy",
    "ReferencedStudySequence", "ProcedureCodeSequence",
    # Patient Study (C.7.2.2)
    "AdmittingDiagnosesDescription", "PatientAge", "PatientSize", "PatientWeight", "MedicalAlerts", "Allergies",
    "Occupation", "AdditionalPatientHistory", "AdmissionID", "PregnancyStatus", "SmokingStatus", "PatientSexNeutered",
    "TimezoneOffsetFromUTC",
)  # fmt: skip
"""What an object takes from its source as it stands: it belongs to the same patient and study."""

NUMBERS: Final = {"seg": 1, "sr": 2, "rtstruct": 3, "sc": 4, "refusal": 5}
"""Kind of object -> last digits of its series number, which begins with the source's."""


def stamp(dataset: Dataset, result: DicomResult, kind: str, description: str) -> Dataset:
    """Make a data set an instance of its own series in the source's study, told apart by `kind` of NUMBERS."""
    identify(
        dataset,
        header=result.header,
        entry=result.entry,
        provenance=result.provenance,
        when=result.when,
        kind=kind,
        description=description,
        uids=(result.study, object_uid(result, kind, "series"), object_uid(result, kind, "instance")),
    )
    return dataset


def object_uid(result: DicomResult, kind: str, part: str) -> str:
    """Return the UID of a result's object of a kind, or of its series; `part` is "instance" or "series"."""
    return result.uid(kind, part, *((result.segmentation_type,) if kind == "seg" else ()))


def identify(
    dataset: Dataset,
    *,
    header: Dataset,
    entry: Entry | None,
    provenance: Provenance,
    when: datetime,
    kind: str,
    description: str,
    uids: tuple[str, str, str],
) -> None:
    """Set the Patient, General Study, General Series, Equipment and SOP Common modules (PS3.3 C.7.1 to C.12.1).

    Args:
        dataset: with all that it says: its digest goes into the provenance.
        header: of the source, for patient and study.
        entry: gives private coding schemes their names.
        uids: of the study, the series and the instance.
    """
    copy_patient_and_study(header, dataset, own_text=_own_text(entry))
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uids
    number = header.get("SeriesNumber")
    dataset.SeriesNumber = (abs(int(number)) % 10**6 if number else 90) * 100 + NUMBERS[kind]
    dataset.InstanceNumber = 1
    dataset.SeriesDescription = f"{description[: LONG_STRING - len(RESEARCH) - 3]} ({RESEARCH})"
    date, time = when.strftime("%Y%m%d"), when.strftime("%H%M%S")
    dataset.SeriesDate, dataset.SeriesTime = date, time
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = date, time
    dataset.Manufacturer = dataset.ManufacturerModelName = SOFTWARE
    dataset.SoftwareVersions = provenance.software
    dataset.DeviceSerialNumber = derived_uid(provenance.entry, *provenance.weights)
    dataset.ContributingEquipmentSequence = [
        *dataset.get("ContributingEquipmentSequence", []),
        *equipment(provenance, content=content_digest(dataset)),
    ]
    for item in dataset.ContributingEquipmentSequence:
        item.ContributionDateTime = f"{date}{time}"
    if schemes := sorted({code.scheme for code in _codes(entry) if code.scheme.startswith("99")}):
        dataset.CodingSchemeIdentificationSequence = [_scheme(scheme) for scheme in schemes]


def copy_patient_and_study(source: Dataset, target: Dataset, *, own_text: str = "") -> None:
    """Copy what identifies patient and study, as DICOM demands; a value that cannot be read is left out."""
    for keyword in EMPTY_WHEN_MISSING:
        setattr(target, keyword, "")
    for keyword in COPIED:
        with contextlib.suppress(*INVALID_FILE):
            if keyword in source:
                target[keyword] = copy.deepcopy(source[keyword])
    charset = source.get("SpecificCharacterSet")
    if not own_text.isascii():
        charset = "ISO_IR 192"
    if charset:
        target.SpecificCharacterSet = charset


@contextlib.contextmanager
def building(what: str) -> Iterator[None]:
    """Silence the libraries while an object is made, and name a failure without any value of the source.

    Raises:
        OutputError: `output-object`.
    """
    logger = logging.getLogger("highdicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with quiet(), _unvalidated():
            yield
    except INVALID_FILE as error:
        kind = type(error).__name__
        message = (
            f"expected a source that a DICOM {what} can refer to, found one that cannot ({kind}): check its header"
        )
        raise OutputError("output-object", message) from None
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _unvalidated() -> Iterator[None]:
    """Let values of the source pass as they stand, whatever their value representation allows."""
    before = config.settings.reading_validation_mode, config.settings.writing_validation_mode
    config.settings.reading_validation_mode = config.settings.writing_validation_mode = config.IGNORE
    try:
        yield
    finally:
        config.settings.reading_validation_mode, config.settings.writing_validation_mode = before


def encoded(dataset: Dataset, *, implicit: bool = False) -> bytes:
    """Return a data set as a PS3.10 file, little endian.

    Args:
        implicit: without value representations, whose lengths hold at most 64 KiB of text (PS3.5 7.1.2).
    """
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    dataset.file_meta = meta
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True, implicit_vr=implicit, little_endian=True)
    return buffer.getvalue()


def write_checked(path: Path, data: bytes, check: Callable[[Path], None]) -> Path:
    """Write an object; it gets its name only when `check` of the written bytes raised nothing."""
    with replacing(path) as partial:
        partial.write_bytes(data)
        check(partial)
    return path


def code_item(value: str, scheme: str, meaning: str) -> Dataset:
    """Return a code sequence item (PS3.3 section 8)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _codes(entry: Entry | None) -> list[Code]:
    labels = entry.labels if entry else ()
    return [code for label in labels for code in (label.category, label.type, label.modifier) if code]


def _own_text(entry: Entry | None) -> str:
    if entry is None:
        return ""
    return "".join([*(label.name for label in entry.labels), *(code.meaning for code in _codes(entry))])


def _scheme(designator: str) -> Dataset:
    """Name a private coding scheme (PS3.3 C.12.1.1.2)."""
    item = Dataset()
    item.CodingSchemeDesignator = designator
    item.CodingSchemeName = f"Private codes of {SOFTWARE} zoo entries"
    item.CodingSchemeResponsibleOrganization = SOFTWARE
    return item
