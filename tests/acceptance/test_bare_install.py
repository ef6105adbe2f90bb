"""The appliance as a hospital gets it: a wheel in an empty environment where torch cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and its [cpu] extra, nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, f"dints-deploy[cpu] @ {wheel.as_uri()}"], check=True, capture_output=True)
    return folder


def test_wheel_holds_the_two_packages_the_zoo_and_the_recipes_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dints_deploy", "dints_search"}
    assert "dints_deploy/_zoo/hippocampus/model.onnx" in names
    assert any(name.startswith("dints_search/_recipes/") for name in names)
    assert [name for name in names if "tests" in name or name.endswith((".nii.gz", ".dcm"))] == []


def test_bare_environment_has_no_torch_and_segments_a_real_scan(bare: Path, tmp_path: Path, data: Path) -> None:
    for package in ("torch", "monai"):
        gone = subprocess.run(
            [str(bare / "bin" / "python"), "-c", f"import {package}"], capture_output=True, check=False
        )
        assert gone.returncode != 0
    scan = data / "Task04_Hippocampus" / "imagesTr" / "hippocampus_038.nii.gz"
    command = [str(bare / "bin" / "dints-deploy"), "segment", str(scan), "-o", str(tmp_path), "--json"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "DINTS_STATE": str(tmp_path / "state")}
    done = subprocess.run(
        [*command, "--to", "nifti,preview,html"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    case = json.loads(done.stdout)["cases"][0]
    volumes = {s["id"]: s["volume_ml"] for s in case["structures"]}
    assert case["parity"] == "certified by the entry"
    assert 1.0 < volumes["hippocampus-anterior"] < 2.6
    assert 0.9 < volumes["hippocampus-posterior"] < 2.4
    assert {Path(path).name for path in case["files"].values()} == {path.name for path in tmp_path.glob("hippo*")}


def test_workshop_commands_say_what_to_install(bare: Path) -> None:
    command = [
        str(bare / "bin" / "dints-deploy"),
        "retrain",
        "--genotype",
        "g",
        "--task",
        "4",
        "--data",
        "d",
        "--out",
        "o",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "extra-missing" in done.stderr
    assert "pip install 'dints-deploy[search]'" in done.stderr
