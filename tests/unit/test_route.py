"""Routes: each condition takes and passes what it should, and says why."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from dints_deploy.config import Config
from dints_deploy.errors import UsageError
from dints_deploy.service.model import RouteMatch, SeriesFacts, StudyFacts
from dints_deploy.service.rehearse import rehearse
from dints_deploy.service.route import check_routes, choose
from tests.command import Machine, threshold_entry
from tests.dicom_phantoms import straight, write

BRAIN = SeriesFacts("aaaa", "MR", "HippoCrop", "BRAIN", (1.0, 1.0, 1.0), (48, 48, 40), (48.0, 48.0, 40.0))
SCOUT = SeriesFacts("bbbb", "MR", "Localizer", "BRAIN", None, None, None)
STUDY = StudyFacts("dicom", ("DINTS",), ("MR1",), (SCOUT, BRAIN))


def config(*routes: dict[str, Any], **title: Any) -> Config:
    whole = [{"entry": "hippocampus", "destinations": ["files"]} | route for route in routes]
    return Config.model_validate(
        {
            "schema_version": 1,
            "data_dir": "/var/lib/dints-deploy",
            "listeners": [{"titles": [{"ae_title": "DINTS", "callers": ["*"]} | title]}],
            "folders": [{"path": "/srv/in", "routes": [whole[-1]["name"]]}],
            "routes": whole,
            "destinations": [{"kind": "folder", "name": "files", "path": "/srv/results"}],
        }
    )


def only(study: StudyFacts, route: dict[str, Any]) -> RouteMatch:
    (match,) = choose(config({"name": "one"} | route), study)
    return match


@pytest.mark.parametrize(
    ("route", "taken", "reason"),
    [
        ({}, True, "it takes every study"),
        ({"calling": ["MR*"]}, True, "sent by MR1"),
        ({"calling": ["CT*"]}, False, r"expected a sender like CT\*, found MR1"),
        ({"series": [{"modality": ["MR"], "description": ["*hippo*"]}]}, True, "series aaaa"),
        ({"series": [{"modality": ["CT"]}]}, False, "modality MR is not like CT"),
        ({"series": [{"description": ["*liver*"]}]}, False, "description HippoCrop is not like"),
        ({"series": [{"exclude_description": ["*o*"]}]}, False, "description is like"),
        ({"series": [{"body_part": ["head", "brain"]}]}, True, "condition 1 is met by"),
        ({"series": [{"spacing_max": [1.5, 1.5, 1.5]}]}, True, "series aaaa"),
        ({"series": [{"spacing_max": [0.5, 1.5, 1.5]}]}, False, r"spacing 1 x 1 x 1 is beyond 0.5 x 1.5 x 1.5"),
        ({"series": [{"shape_min": [32, 32, 60]}]}, False, "shape 48 x 48 x 40 is beyond"),
        ({"series": [{"extent_max": [90, 90, 90]}]}, True, "series aaaa"),
        ({"series": [{"description": ["local*"]}, {"description": ["*crop"]}]}, True, "condition 2 is met by"),
        ({"series": [{"description": ["local*"]}, {"modality": ["PT"]}]}, False, "no series meets condition 2"),
    ],
)
def test_a_condition_takes_and_passes_and_says_why(route: dict[str, Any], taken: bool, reason: str) -> None:
    match = only(STUDY, route)
    assert match.taken is taken
    assert re.search(reason, match.reason), match.reason


def test_doors_lead_only_to_their_routes_and_higher_priority_comes_first() -> None:
    both = config({"name": "low"}, {"name": "high", "priority": 5}, routes=["low"])
    assert [(match.route, match.taken) for match in choose(both, STUDY)] == [("high", False), ("low", True)]
    folder = replace(STUDY, doors=("/srv/in",), calling=())
    assert [(match.route, match.taken) for match in choose(both, folder)] == [("high", True), ("low", False)]
    two_doors = replace(STUDY, doors=("DINTS", "/srv/in"))
    assert [match.taken for match in choose(both, two_doors)] == [True, True]


def test_nifti_takes_only_routes_that_ask_nothing_of_series_and_make_no_dicom() -> None:
    nifti = StudyFacts("nifti", ("/srv/in",), (), ())
    assert only(nifti, {"outputs": ["nifti", "html"]}).taken
    assert not only(nifti, {"outputs": ["dicom-seg"]}).taken
    assert not only(nifti, {"outputs": ["nifti"], "series": [{"modality": ["MR"]}]}).taken


def test_text_of_a_study_cannot_reach_a_terminal_or_be_evaluated() -> None:
    hostile = replace(BRAIN, SeriesDescription="\x1b[2J__import__('os').system('true')")
    match = only(replace(STUDY, series=(hostile,)), {"series": [{"description": ["x"]}]})
    assert "\x1b" not in match.reason


def test_routes_of_unknown_entries_and_outputs_are_refused() -> None:
    with pytest.raises(UsageError, match=r"routes\.one\.entry: expected an entry of .*hippocampus"):
        check_routes(config({"name": "one", "entry": "liver"}))
    with pytest.raises(UsageError, match="expected outputs of"):
        check_routes(config({"name": "one", "outputs": ["fax"]}))
    check_routes(config({"name": "one"}))


def test_route_test_says_what_would_happen_and_keeps_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    channel = {"name": "CT", "modality": "CT", "intensity": {"scheme": "identity"}}
    machine.add(threshold_entry("open", accepts={"modality": ["CT"]}, channels=[channel]))
    write(tmp_path / "scan", straight(planes=8, rows=20, columns=20))
    document = config(
        {"name": "all", "entry": "open"}, {"name": "mr", "entry": "open", "series": [{"modality": ["MR"]}]}
    )
    path = tmp_path / "appliance.toml"
    path.write_text(tomli_w.dumps(document.model_dump(mode="json", exclude_none=True)))
    path.chmod(0o600)
    before = sorted(tmp_path.rglob("*"))
    done = machine.run("route", "test", "scan", "--config", path, "--called", "DINTS", "--json")
    assert done.code == 0, done.err
    taken, passed = done.json["routes"]
    assert (taken["route"], taken["taken"], passed["taken"]) == ("all", True, False)
    assert taken.get("refusal") is None
    assert list(taken["series"]) == ["CT"]
    assert "modality CT is not like MR" in passed["reason"]
    text = machine.run("route", "test", "scan", "--config", path, "--called", "DINTS")
    assert "all: takes the study" in text.out
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UsageError, match="expected --called of DINTS"):
        rehearse(tmp_path / "scan", config({"name": "all"}), called="OTHER")
