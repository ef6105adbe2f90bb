"""The daemon as an operator runs it: real processes, signals, ports and files; what comes in goes out, once."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import urllib3
from pydicom import dcmread

from benchmarks.daemon_kill import run as run_kills
from tests.command import good_scan
from tests.daemons import LEVEL, Site, archive, daemon, site, study
from tests.dicom_phantoms import MARK
from tests.peers import wait_until

KILLS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A daemon that the tests of this module share, each with studies of its own."""
    with daemon(tmp_path_factory.mktemp("shared"), outputs=("dicom-seg", "dicom-sr")) as one:
        yield one


def job_of(place: Site, files: list[Path], *, revision: int = 1) -> dict[str, Any]:
    """Return the job of a study's revision, or of a later one, once it is finished and the current one."""
    uid = dcmread(files[0]).SOPInstanceUID
    query = (
        "SELECT j.id, j.state, j.revision FROM job j JOIN instance i ON i.study_id = j.study_id WHERE i.uid = ?"
        " AND j.state IN ('done', 'refused', 'quarantined') AND j.revision >= ? ORDER BY j.revision DESC"
    )
    found: list[tuple[Any, ...]] = []

    def finished() -> bool:
        found[:] = place.rows(query, uid, revision)
        return bool(found)

    wait_until(finished, seconds=60, what="a result")
    return dict(zip(("id", "state", "revision"), found[0], strict=True))


def opened(place: Site, job: str, kind: str = "sr") -> Any:
    """Return an object of a delivered result."""
    return dcmread(place.folder / "results" / job / f"result.{kind}.dcm")


def referred(path: Path) -> set[str]:
    """Return the source instances that a SEG refers to."""
    found: Any = dcmread(path)
    (series,) = found.ReferencedSeriesSequence
    return {str(one.ReferencedSOPInstanceUID) for one in series.ReferencedInstanceSequence}


def test_a_study_comes_back_as_a_segmentation_that_refers_to_it(place: Site, tmp_path: Path) -> None:
    files = study(tmp_path, 1)
    place.send(files)
    job = job_of(place, files)
    made, _ = place.delivered()[job["id"]]
    result = dcmread(made)
    assert result.Modality == "SEG"
    assert referred(made) == {str(dcmread(file).SOPInstanceUID) for file in files}
    bright = sum(int((dcmread(file).pixel_array > LEVEL).sum()) for file in files)
    assert int(result.pixel_array.sum()) == bright


def test_the_same_study_again_changes_nothing(place: Site, tmp_path: Path) -> None:
    files = study(tmp_path, 2)
    place.send(files)
    job = job_of(place, files)
    made, _ = place.delivered()[job["id"]]
    before = made.stat().st_mtime_ns, place.rows("SELECT * FROM job"), len(place.delivered())
    place.send(files)
    time.sleep(1.0)
    assert "receiving" not in place.states()
    assert (made.stat().st_mtime_ns, place.rows("SELECT * FROM job"), len(place.delivered())) == before


def test_two_associations_with_a_pause_give_one_current_result_of_all_slices(place: Site, tmp_path: Path) -> None:
    files = study(tmp_path, 3, planes=6)
    place.send(files[:4])
    first = job_of(place, files)
    place.send(files[4:])
    second = job_of(place, files, revision=2)
    assert second["id"] != first["id"]
    assert place.rows("SELECT state FROM job WHERE id = ?", first["id"]) == [("superseded",)]
    seg, report, earlier = opened(place, second["id"], "seg"), opened(place, second["id"]), opened(place, first["id"])
    assert len(referred(place.delivered()[second["id"]][0])) == 6
    assert "Supersedes" in seg.ContentDescription
    (named,) = report.PredecessorDocumentsSequence
    (series,) = named.ReferencedSeriesSequence
    assert (named.StudyInstanceUID, series.SeriesInstanceUID) == (earlier.StudyInstanceUID, earlier.SeriesInstanceUID)
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == earlier.SOPInstanceUID
    assert report.SeriesInstanceUID != earlier.SeriesInstanceUID


def test_what_comes_late_and_is_not_of_the_series_gives_the_same_files_again(place: Site, tmp_path: Path) -> None:
    files = study(tmp_path / "scan", 7)
    place.send(files)
    first = job_of(place, files)
    other = study(tmp_path / "other", 8, planes=1)
    for file in other:  # an image of another series of the same study
        dataset = dcmread(file)
        dataset.StudyInstanceUID, dataset.Modality = dcmread(files[0]).StudyInstanceUID, "MR"
        dataset.save_as(file)
    place.send(other)
    second = job_of(place, files, revision=2)
    contents = [[path.read_bytes() for path in place.delivered()[job["id"]]] for job in (first, second)]
    assert contents[0] == contents[1]


def test_a_second_daemon_on_the_folder_refuses_to_start_and_says_so(place: Site) -> None:
    said = place.run("watch")
    assert said.returncode == 1
    assert "found a daemon at work there" in said.stderr
    assert "[daemon-running]" in said.stderr
    assert str(place.process.pid if place.process else 0) in said.stderr


def test_the_commands_tell_of_jobs_and_of_an_unbroken_trail(place: Site, tmp_path: Path) -> None:
    files = study(tmp_path, 4)
    place.send(files)
    job = job_of(place, files)
    listed = json.loads(place.run("jobs", "list", "--json").stdout)
    assert job["id"] in {line["id"] for line in listed["jobs"]}
    shown = json.loads(place.run("jobs", "show", job["id"][:12], "--json").stdout)
    assert shown["complete_because"] == "every association was released; 1 series without a gap"
    assert [event["action"] for event in shown["history"]] == [
        "complete", "queued", "claimed", "produced", "delivered", "closed",
    ]  # fmt: skip
    assert place.run("audit", "verify").returncode == 0


def test_nothing_that_names_a_patient_is_in_log_trail_or_database_commands(place: Site, tmp_path: Path) -> None:
    files = study(tmp_path, 5)
    place.send(files)
    job = job_of(place, files)
    trail = (place.data_dir / "audit" / "audit.jsonl").read_text()
    texts = [
        place.log.read_text(),
        trail,
        place.run("jobs", "list").stdout,
        place.run("jobs", "show", job["id"]).stdout,
    ]
    first = dcmread(files[0])
    for word in (MARK, first.PatientBirthDate, first.StudyInstanceUID, first.SOPInstanceUID):
        assert all(str(word) not in text for text in texts)


def test_health_and_metrics_tell_the_truth(place: Site, tmp_path: Path) -> None:
    files = study(tmp_path, 6)
    place.send(files)
    job_of(place, files)
    http = urllib3.PoolManager()
    assert http.request("GET", f"http://127.0.0.1:{place.http_port}/readyz").status == 200
    said = http.request("GET", f"http://127.0.0.1:{place.http_port}/metrics").data.decode()
    http.clear()
    figures = dict(line.rsplit(" ", 1) for line in said.splitlines() if not line.startswith("#"))
    ((objects,),) = place.rows("SELECT count(*) FROM instance")
    assert float(figures['dints_deploy_intake_objects_total{outcome="new"}']) == objects
    done = float(figures['dints_deploy_jobs{state="done"}'])
    assert [(done,)] == place.rows("SELECT count(*) FROM job WHERE state = 'done'")


def test_stop_restart_reload_folder_and_refusal_in_the_life_of_one_daemon(tmp_path: Path) -> None:
    place = site(tmp_path / "site", outputs=("dicom-seg", "dicom-sr"))
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (route,) = place.fields["routes"]
    scan_route = {"name": "scans", "entry": route["entry"], "outputs": ["nifti"], "destinations": ["results"]}
    folder = {"path": str(inbox), "scan_seconds": 0.2, "settle_seconds": 0.1, "routes": ["scans"]}
    titles = [{"ae_title": "DINTS", "callers": ["*"], "routes": ["all"]}]
    listener = place.fields["listeners"][0] | {"titles": titles}
    place.configure(routes=[route | {"send_refusals": True}, scan_route], folders=[folder], listeners=[listener])
    place.start()
    try:
        good_scan(inbox, "somebody.nii.gz")
        place.wait_done(1)
        ((made,),) = place.delivered().values()
        assert made.name == "somebody_seg.nii.gz"

        few = study(tmp_path / "few", 11, planes=2)  # the gate wants more slices
        place.send(few)
        job = job_of(place, few)
        assert job["state"] == "refused"
        (report,) = place.delivered()[job["id"]]
        assert dcmread(report).Modality == "SR"

        with archive(tmp_path / "pacs") as pacs:
            destination = {
                "kind": "dicom", "name": "pacs", "host": "127.0.0.1", "port": pacs.port, "ae_title": "PACS",
                "calling_ae_title": "DINTS",
            }  # fmt: skip
            place.configure(
                destinations=[*place.fields["destinations"], destination],
                routes=[route | {"destinations": ["results", "pacs"]}, scan_route],
            )
            assert place.process is not None
            place.process.send_signal(signal.SIGHUP)
            wait_until(lambda: '"reloaded"' in place.log.read_text(), what="the reload")
            place.send(study(tmp_path / "more", 12))
            wait_until(lambda: place.states().get("done") == 2, seconds=60, what="the second result")
            assert len(pacs.uids()) == 2  # SEG and SR

            place.configure(routes=[route | {"entry": "no-such-entry"}])
            place.process.send_signal(signal.SIGHUP)
            wait_until(lambda: '"not_reloaded"' in place.log.read_text(), what="the refusal to reload")
            assert place.process.poll() is None

        assert place.stop() == 0
        place.configure(routes=[route, scan_route])
        place.start()
        assert place.rows("SELECT count(*) FROM job WHERE interruptions > 0 OR state NOT IN ('done', 'refused')") == [
            (0,)
        ]
        assert place.stop() == 0
    finally:
        place.stop(signal.SIGKILL)


def test_a_job_whose_worker_always_crashes_is_put_aside_and_can_be_retried(tmp_path: Path) -> None:
    place = site(tmp_path / "site")
    place.configure(worker=place.fields["worker"] | {"attempts": 2, "retry_seconds": 0.1})
    place.start(DINTS_FAULT="work-inputs:1:kill")
    try:
        files = study(tmp_path, 21)
        place.send(files)
        job = job_of(place, files)
        assert place.rows("SELECT state, code, crashes FROM job") == [("quarantined", "worker-crashed", 2)]
        assert place.process is not None
        assert place.process.poll() is None
        place.stop()
        place.start()
        said = place.run("jobs", "retry", job["id"], "--json")
        assert json.loads(said.stdout)["state"] == "queued"
        place.wait_done(1)
    finally:
        place.stop(signal.SIGKILL)


def test_a_daemon_told_to_stop_gives_a_job_back_that_it_cannot_finish(tmp_path: Path) -> None:
    place = site(tmp_path / "site")
    place.start(DINTS_FAULT="work-inputs:1:pause")
    try:
        place.send(study(tmp_path, 31))
        wait_until(lambda: place.states() == {"running": 1}, seconds=60, what="the job")
        assert place.process is not None
        place.process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert place.stop() == 0  # the second signal: at once
        assert place.rows("SELECT state, attempts FROM job") == [("queued", 0)]
        place.start()
        place.wait_done(1)
    finally:
        place.stop(signal.SIGKILL)


def test_killed_at_named_points_and_random_times_nothing_is_lost_doubled_stuck_or_orphaned(tmp_path: Path) -> None:
    tally = run_kills(tmp_path, kills=KILLS, seed=5)
    assert tally["kills"] >= KILLS
    assert tally["lost, doubled, stuck, orphaned"] == 0
    assert tally["studies"] > 0
