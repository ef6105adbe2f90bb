"""The daemon between a scanner and a PACS: DCMTK sends, the daemon segments, Orthanc holds the results."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from prometheus_client.parser import text_string_to_metric_families
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage, generate_uid

from tests.dicom_phantoms import MARK, straight, write
from tests.peers import Certificates, Orthanc, certificates, free_port, orthanc, wait_until
from tests.real_study import write_study
from tests.receiving import dcmtk

QUIET_SECONDS = 20.0


@dataclass(frozen=True)
class Ward:
    """A daemon at work, the PACS it sends to, and the ports of the senders."""

    folder: Path
    process: subprocess.Popen[bytes]
    pacs: Orthanc
    port: int
    tls_port: int
    http_port: int
    certificates: Certificates

    def states(self) -> dict[tuple[str, str], float]:
        """Return how many jobs and deliveries are in each state, as /metrics says."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/metrics", timeout=5) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [sample for family in families for sample in family.samples]
        counted = ("dints_deploy_jobs", "dints_deploy_deliveries")
        return {
            (one.name, ",".join(sorted(one.labels.values()))): one.value
            for one in samples
            if one.name in counted and one.value
        }

    def idle(self) -> bool:
        """Say whether nothing waits or runs."""
        return all(
            state.rpartition(",")[2] in ("done", "superseded", "sent", "cancelled") for _, state in self.states()
        )

    def results(self, study: str) -> dict[str, list[Any]]:
        """Return the objects of a study that Orthanc holds, by Modality."""
        found: dict[str, list[Any]] = {}
        for series in self.pacs.get("series?expand"):
            for instance in series["Instances"]:
                with urllib.request.urlopen(f"{self.pacs.url}/instances/{instance}/file", timeout=10) as answer:
                    ds = dcmread(io.BytesIO(answer.read()))
                if ds.StudyInstanceUID == study:
                    found.setdefault(str(ds.Modality), []).append(ds)
        return found

    def ready(self) -> bool:
        """Say whether the daemon says that it is ready."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def wait_for_results(self, study: str) -> dict[str, list[Any]]:
        """Wait until Orthanc holds a result of a study and nothing more is to be done."""
        wait_until(lambda: {"SEG", "SR"} <= set(self.results(study)), seconds=90, what="results")
        wait_until(self.idle, seconds=60, what="the end of the job")
        return self.results(study)


def configuration(folder: Path, made: Certificates, pacs: Orthanc, ports: tuple[int, int, int]) -> dict[str, Any]:
    port, tls_port, http_port = ports
    tls = {"certificate": str(made.server[0]), "key": str(made.server[1]), "authority": str(made.authority)}
    known = {"callers": ["MR1", "ORTHANC"], "addresses": ["127.0.0.0/8"]}
    return {
        "schema_version": 1,
        "data_dir": str(folder / "data"),
        "listeners": [
            {"address": "127.0.0.1", "port": port, "titles": [{"ae_title": "DINTS"} | known]},
            {"address": "127.0.0.1", "port": tls_port, "titles": [{"ae_title": "DINTSTLS"} | known], "tls": tls},
        ],
        "completeness": {"settled_seconds": 0.5, "released_seconds": 0.5, "quiet_seconds": QUIET_SECONDS},
        "routes": [{"name": "hippocampus", "entry": "hippocampus", "destinations": ["pacs", "files"],
                    "series": [{"modality": ["MR"]}]}],
        "destinations": [
            {"kind": "dicom", "name": "pacs", "host": "127.0.0.1", "port": pacs.dicom_port, "ae_title": "ORTHANC",
             "calling_ae_title": "DINTS", "commitment": True},
            {"kind": "folder", "name": "files", "path": str(folder / "results")},
        ],
        "worker": {"engine": "onnx", "threads": 1},
        "disk": {"free_bytes": 1 << 20},
        "http": {"port": http_port},
        "log": {"file": str(folder / "log")},
    }  # fmt: skip


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    folder = tmp_path_factory.mktemp("ward")
    made = certificates(folder / "tls")
    ports = (free_port(), free_port(), free_port())
    with orthanc(folder / "orthanc", modalities={"DINTS": ("127.0.0.1", ports[0])}) as pacs:
        path = folder / "a.toml"
        path.write_text(tomli_w.dumps(configuration(folder, made, pacs, ports)))
        path.chmod(0o600)
        command = [sys.executable, "-m", "dints_deploy", "watch", "--config", str(path)]
        environment = os.environ | {"DINTS_STATE": str(folder / "state"), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=environment) as process:
            try:
                one = Ward(folder, process, pacs, *ports, made)
                wait_until(one.ready, seconds=60, what="the daemon")
                yield one
            finally:
                process.kill()


def brain_study(folder: Path, data: Path, *, seed: int) -> tuple[list[Path], str, str]:
    """Write a study of a hippocampus crop and a whole head; return its files, its UID and the UID of the crop."""
    scan = data / "Task04_Hippocampus" / "imagesTr" / f"hippocampus_0{34 + seed}.nii.gz"
    crop = write_study(scan, folder / "crop", seed=seed)
    first = dcmread(crop[0], stop_before_pixels=True)
    head_series = generate_uid()

    def as_head(ds: Dataset, index: int) -> None:
        ds.SOPClassUID, ds.Modality, ds.SeriesDescription, ds.SeriesNumber = MRImageStorage, "MR", "T2 head", 9
        ds.StudyInstanceUID, ds.SeriesInstanceUID = first.StudyInstanceUID, head_series
        ds.SOPInstanceUID = generate_uid()

    head = write(folder / "head", straight(planes=12, rows=120, columns=120, step=14.0), change=as_head, name="head")
    return [*head, *crop], str(first.StudyInstanceUID), str(first.SeriesInstanceUID)


def real_study(folder: Path, data: Path) -> tuple[list[Path], str, str]:
    """Return the files of a real brain study that has a crop among whole heads; a made one where it is not here."""
    root = Path(os.environ.get("DINTS_DATA") or Path(__file__).parents[3] / "shared" / "data")
    paths = sorted((root / "scans" / "brain-studies" / "study-3").rglob("*.dcm"))
    if not paths:
        return brain_study(folder, data, seed=19)
    crop = next(
        ds for ds in (dcmread(p, stop_before_pixels=True) for p in paths) if ds.SeriesDescription == "HippoCrop"
    )
    return paths, str(crop.StudyInstanceUID), str(crop.SeriesInstanceUID)


def assert_one_result(results: dict[str, list[Any]], crop: str, folder: Path) -> None:
    """Check that there is one SEG and one SR of the crop, each valid."""
    assert {modality: len(objects) for modality, objects in results.items()} == {"SEG": 1, "SR": 1}
    (seg,), (report,) = results["SEG"], results["SR"]
    assert [item.SeriesInstanceUID for item in seg.ReferencedSeriesSequence] == [crop]
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert {crop, seg.SeriesInstanceUID} <= {item.SeriesInstanceUID for item in evidence}
    if shutil.which("dciodvfy"):
        for ds in (seg, report):
            path = folder / f"{ds.Modality}.dcm"
            ds.save_as(path)
            said = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False).stderr
            assert [line for line in said.splitlines() if line.startswith("Error")] == []


def test_a_pushed_study_comes_back_as_one_seg_and_one_sr_and_once_more_changes_nothing(
    ward: Ward, data: Path, tmp_path: Path
) -> None:
    paths, study, crop = brain_study(tmp_path, data, seed=0)
    assert dcmtk("dcmsend", ward.port, *paths)[0] == 0
    results = ward.wait_for_results(study)
    assert_one_result(results, crop, tmp_path)
    states = ward.states()
    assert dcmtk("dcmsend", ward.port, *paths)[0] == 0
    time.sleep(2)
    assert ward.states() == states
    again = ward.results(study)
    assert {m: [ds.SOPInstanceUID for ds in found] for m, found in again.items()} == {
        m: [ds.SOPInstanceUID for ds in found] for m, found in results.items()
    }
    stored = sorted((ward.folder / "results").rglob("*.dcm"))
    assert {str(dcmread(path).SOPInstanceUID) for path in stored} == {
        str(ds.SOPInstanceUID) for found in results.values() for ds in found
    }


def test_a_study_in_two_associations_with_a_pause_gives_one_result(ward: Ward, data: Path, tmp_path: Path) -> None:
    """The gap shows that more is to come. (A tail that is missing does not show: it makes a later revision.)"""
    paths, study, crop = brain_study(tmp_path, data, seed=4)
    later = paths[-20:-11]
    assert dcmtk("dcmsend", ward.port, *(path for path in paths if path not in later))[0] == 0
    time.sleep(3)
    assert ward.results(study) == {}
    assert dcmtk("dcmsend", ward.port, *later)[0] == 0
    assert_one_result(ward.wait_for_results(study), crop, tmp_path)


def test_tls_and_callers_are_asked_for(ward: Ward, data: Path, tmp_path: Path) -> None:
    paths, study, crop = brain_study(tmp_path, data, seed=5)
    made = ward.certificates
    assert dcmtk("echoscu", ward.port, calling="STRANGER")[0] != 0
    right = ["+tls", made.client[1], made.client[0], "+cf", made.authority]
    wrong = ["+tls", made.stranger[1], made.stranger[0], "+cf", made.authority]
    assert dcmtk("storescu", ward.tls_port, *wrong, *paths, called="DINTSTLS")[0] != 0
    assert ward.results(study) == {}
    assert dcmtk("storescu", ward.tls_port, *right, *paths, called="DINTSTLS")[0] == 0
    assert_one_result(ward.wait_for_results(study), crop, tmp_path)


def test_a_real_study_of_several_series_gives_the_crop(ward: Ward, data: Path, tmp_path: Path) -> None:
    paths, study, crop = real_study(tmp_path, data)
    assert dcmtk("dcmsend", ward.port, *paths)[0] == 0
    assert_one_result(ward.wait_for_results(study), crop, tmp_path)


def test_the_daemon_ends_cleanly_and_its_log_names_no_patient(ward: Ward) -> None:
    ward.process.send_signal(signal.SIGTERM)
    assert ward.process.wait(60) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{ward.http_port}/healthz", timeout=2)
    log = (ward.folder / "log").read_text()
    assert '"action": "delivered"' in log
    assert MARK not in log
