"""The doctor finds what is wrong on this machine, and nothing where nothing is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dints_deploy.runtime.doctor import CHECKS, Finding, certificates, engines, entries, examine, state
from dints_deploy.runtime.machine import FEATURES, cpu_features, cpu_model, describe_device
from tests.tiny_entry import entry_fields, random_network, run_cli, write_entry


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DINTS_ZOO", str(tmp_path / "zoo"))
    monkeypatch.setenv("DINTS_STATE", str(tmp_path / "state"))
    write_entry(tmp_path / "zoo" / "tiny", entry_fields("tiny"), [random_network(0).onnx()])
    return tmp_path


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_a_machine_in_order_has_no_problem(place: Path) -> None:
    said = run_cli("doctor", "--json")
    document: dict[str, Any] = json.loads(said.out)
    found = {finding["subject"]: finding for finding in document["findings"]}
    assert (said.code, document["problems"]) == (0, 0)
    for subject in ("processor", "engine openvino", "engine onnx", "entry tiny", "room for plans", "clock"):
        assert found[subject]["status"] == "ok", found[subject]
    assert found["engine onnx"]["found"].startswith("1.")
    assert all(finding["fix"] for finding in document["findings"] if finding["status"] != "ok")
    text = run_cli("doctor").out
    assert all(subject in text for subject in found)
    assert not (place / "state").exists()  # it only looks


def test_a_damaged_entry_is_a_problem_with_its_code(place: Path) -> None:
    network = place / "zoo" / "tiny" / "model.onnx"
    network.write_bytes(network.read_bytes()[:-1])
    [finding] = examine((entries,))
    assert finding.status == "problem"
    assert "[entry-checksum]" in finding.found
    assert run_cli("doctor").code == 1


def test_a_state_folder_open_to_others_is_a_problem(place: Path) -> None:
    folder = place / "state"
    folder.mkdir(mode=0o700)
    assert by_subject(examine((state,)))["folder state"].status == "ok"
    folder.chmod(0o755)
    finding = by_subject(examine((state,)))["folder state"]
    assert finding.status == "problem"
    assert f"chmod 700 {folder}" in finding.fix


def test_a_certificate_that_does_not_hold_is_a_problem(place: Path) -> None:
    folder = place / "state" / "engines"
    folder.mkdir(parents=True)
    (folder / "abc-openvino-int8-cpu.json").write_text("{}")
    [finding] = examine((certificates,))
    assert finding.status == "problem"
    assert "[certificate-invalid]" in finding.found


def test_two_packages_of_onnx_runtime_are_a_problem(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "ONNX Runtime" not in by_subject(examine((engines,)))
    other = tmp_path / "site" / "onnxruntime_gpu-1.30.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.30.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    finding = by_subject(examine((engines,)))["ONNX Runtime"]
    assert finding.status == "problem"
    assert "onnxruntime-gpu 1.30.0" in finding.found
    assert "pip uninstall" in finding.fix
    shutil.rmtree(other)
    assert "ONNX Runtime" not in by_subject(examine((engines,)))


def test_the_device_is_described_by_what_engines_choose_their_kernels_by() -> None:
    line = describe_device("cpu")
    assert cpu_model() in line
    flags = Path("/proc/cpuinfo").read_text().split()
    assert set(cpu_features()) == {name for name in FEATURES if name in flags}
    assert all(name in line for name in cpu_features())


def test_every_check_of_the_table_yields_something_somewhere(place: Path) -> None:
    for check in CHECKS:
        findings = list(check())
        assert findings or check is certificates
        assert all(finding.found for finding in findings)
