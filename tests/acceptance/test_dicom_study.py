"""A study as a PACS holds it: the right series is chosen, every object is written, valid and true to its source."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.dicom_phantoms import scans

FORMATS = "nifti,dicom-seg,dicom-sr,rtstruct,dicom-sc,preview,html"
CHOSEN = {"study-1": "HippoCrop", "study-3": "HippoCrop"}


def call(*words: str) -> tuple[int, Any]:
    """Run a command with --json and return its exit code and document."""
    command = [sys.executable, "-m", "dints_deploy", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("study", ["study-1", "study-3"])
def test_hippocampus_crop_of_a_study_is_chosen_and_every_object_verifies(study: str, tmp_path: Path) -> None:
    source = scans("brain-studies", study)
    code, document = call("segment", str(source), "--model", "hippocampus", "-o", str(tmp_path), "--to", FORMATS)
    assert code == 0
    case = document["cases"][0]
    assert set(case["files"]) == set(FORMATS.split(","))
    tree = call("dicom", "inspect", str(source))[1]
    labels = {s["series"]: s["description"] for one in tree["studies"] for s in one["series"]}
    assert [labels[label] for label in case["series"]["chosen"].values()] == [CHOSEN[study]]
    assert all(1.0 < s["volume_ml"] < 2.6 for s in case["structures"])
    for name in ("dicom-seg", "dicom-sr", "rtstruct", "dicom-sc"):
        code, verification = call("verify", case["files"][name], "--source", str(source))
        assert code == 0, verification
        if shutil.which("dciodvfy"):
            checked = subprocess.run(["dciodvfy", case["files"][name]], capture_output=True, text=True, check=False)
            assert [line for line in checked.stderr.splitlines() if line.startswith("Error")] == []


def test_zip_of_a_study_gives_the_same_mask(tmp_path: Path) -> None:
    source = scans("brain-studies", "study-3")
    archive = tmp_path / "study.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(source.rglob("*.dcm")):
            packed.write(path, path.relative_to(source))
    masks = []
    for scan in (source, archive):
        out = tmp_path / scan.stem
        assert call("segment", str(scan), "--model", "hippocampus", "-o", str(out), "--to", "nifti,dicom-seg")[0] == 0
        masks.append(next(out.glob("*.nii.gz")).read_bytes())
    assert masks[0] == masks[1]
    assert [path.name for path in tmp_path.glob(".partial*")] == []


def test_refused_study_says_why_in_an_sr(tmp_path: Path) -> None:
    source = scans("negated-cosines")
    code, document = call("segment", str(source), "--model", "hippocampus", "-o", str(tmp_path), "--to", "dicom-sr")
    assert code == 3
    assert document["cases"][0]["code"] == "scan-modality"
    report = next(tmp_path.glob("*.sr.dcm"))
    assert document["cases"][0]["notes"] == [f"the refusal is written as {report}"]
    assert call("verify", str(report))[1]["kind"] == "refusal"
