"""Which series of a study an entry takes, by each rule that it may declare, and what its geometry policy may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from dints_deploy.catalog.entry import Entry, GeometryPolicy
from dints_deploy.dicom.findings import KINDS, Action
from dints_deploy.dicom.series import Study, collect
from dints_deploy.errors import EntryError, ScanRefused
from dints_deploy.process.choose import choose_series, policy_of
from tests.dicom_phantoms import straight, write
from tests.dicom_results import ENTRY

SERIES: Mapping[str, Mapping[str, str]] = {
    "native": {"SeriesDescription": "Abdomen 5.0", "BodyPartExamined": "ABDOMEN"},
    "contrast": {"SeriesDescription": "Abdomen 5.0 KM", "BodyPartExamined": "ABDOMEN", "ContrastBolusAgent": "yes"},
    "chest": {"SeriesDescription": "Thorax lung", "BodyPartExamined": "CHEST"},
    "mr": {"SeriesDescription": "abdomen vibe", "BodyPartExamined": "ABDOMEN", "Modality": "MR"},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    for name, attributes in SERIES.items():
        write(folder / name, straight(), change=having(attributes), name=name)
    return collect(folder)


def having(attributes: Mapping[str, str]) -> Any:
    def change(ds: Dataset, index: int) -> None:
        for keyword, value in attributes.items():
            setattr(ds, keyword, value)

    return change


def entry(**rules: Any) -> Entry:
    """Return an entry whose only channel declares these rules for its series."""
    fields = ENTRY.model_dump()
    fields["channels"][0]["series"] = rules
    return Entry.model_validate(fields)


@pytest.mark.parametrize(
    ("rules", "chosen"),
    [
        ({"description": ["*km*"]}, "contrast"),
        ({"body_part": ["chest", "lung"]}, "chest"),
        ({"exclude_description": ["*km*", "*lung*"]}, "native"),
        ({"body_part": ["abdomen"], "contrast": "excluded"}, "native"),
        ({"contrast": "required"}, "contrast"),
    ],
)
def test_a_rule_chooses_its_series_and_names_a_reason_for_every_other(
    study: Study, rules: dict[str, Any], chosen: str
) -> None:
    choice = choose_series({"": study}, entry(**rules))
    assert choice.series["CT"].SeriesDescription == SERIES[chosen]["SeriesDescription"]
    assert len(choice.not_chosen) == len(SERIES) - 1
    assert all(": expected " in line and ": choose another" in line for line in choice.not_chosen)


def test_several_that_fit_are_a_refusal_with_the_candidates(study: Study) -> None:
    with pytest.raises(ScanRefused, match="series-ambiguous") as refused:
        choose_series({"": study}, entry(body_part=["abdomen"]))
    assert "(Abdomen 5.0)" in refused.value.message
    assert "(Abdomen 5.0 KM)" in refused.value.message
    assert "Thorax" not in refused.value.message


def test_none_that_fits_is_a_refusal_with_a_reason_for_each(study: Study) -> None:
    with pytest.raises(ScanRefused, match="series-none") as refused:
        choose_series({"": study}, entry(description=["*liver*"]))
    assert refused.value.message.count("expected a description like *liver*") == 3
    assert refused.value.message.count("expected CT, found MR") == 1


def test_a_policy_has_every_action_that_a_finding_allows() -> None:
    for code, kind in KINDS.items():
        for action in Action:
            geometry = {"findings": {code: str(action)}}
            if code == "dicom-tilt":
                geometry = {"tilt": str(action)}  # type: ignore[dict-item]
            elif code in ("dicom-uneven-steps", "dicom-missing-slice"):
                continue  # of the schema: tests/unit/test_entry.py
            if action in kind.allowed:
                assert policy_of(GeometryPolicy.model_validate(geometry)).action(code) is action
            else:
                with pytest.raises(EntryError, match="entry-invalid"):
                    policy_of(GeometryPolicy.model_validate(geometry))


@pytest.mark.parametrize("findings", [{"dicom-nothing": "accept"}, {"dicom-tilt": "accept"}])
def test_a_policy_for_no_finding_or_for_one_said_elsewhere_is_refused(findings: dict[str, str]) -> None:
    with pytest.raises(EntryError, match="entry-invalid"):
        policy_of(GeometryPolicy.model_validate({"findings": findings}))


def test_an_entry_may_accept_two_slices_and_inverted_grey(tmp_path: Path) -> None:
    write(tmp_path, straight(planes=2), change=having({"PhotometricInterpretation": "MONOCHROME1"}))
    study = collect(tmp_path)
    with pytest.raises(ScanRefused, match="dicom-monochrome1"):
        choose_series({"": study}, ENTRY)
    geometry = GeometryPolicy.model_validate({"minimum_slices": 2, "findings": {"dicom-monochrome1": "accept"}})
    assert len(choose_series({"": study}, ENTRY.model_copy(update={"geometry": geometry})).series["CT"].slices) == 2


@pytest.mark.parametrize("tilt", ["accept", "regularise"])
def test_an_evenly_tilted_series_is_chosen_where_the_entry_allows_it(tmp_path: Path, tilt: str) -> None:
    upright = straight(planes=6)
    lean = np.arange(6)[:, np.newaxis] * np.array([0.0, 0.5, 0.0])
    write(tmp_path, replace(upright, positions=upright.positions + lean))
    study = collect(tmp_path)
    with pytest.raises(ScanRefused, match="dicom-tilt"):
        choose_series({"": study}, ENTRY)
    chosen = ENTRY.model_copy(update={"geometry": GeometryPolicy.model_validate({"tilt": tilt})})
    assert choose_series({"": study}, chosen).series["CT"].slices
