"""The zoo, through its commands: every changed byte is refused by name, and what is added is whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dints_deploy.catalog.catalog import ENTRY_FILE, load_entry
from dints_deploy.catalog.weights import SUMS_FILE
from dints_deploy.errors import EntryError
from dints_deploy.imaging.volume import Volume
from tests.tiny_entry import (
    Said,
    customised,
    entry_fields,
    full_disk,
    outside,
    random_network,
    random_scan,
    run_cli,
    scan_file,
    sign,
    threshold_network,
    write_entry,
)

NETWORK = random_network(0).onnx()
EXTRA = {"card.md": b"# Tiny\n", "metrics.json": b"{}\n", "more/notes.txt": b"in a folder\n"}
FILES = [ENTRY_FILE, "model.onnx", *EXTRA]


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shipped zoo with the entry `tiny`, an empty state folder, and `scan.nii.gz` beside them."""
    monkeypatch.setenv("DINTS_ZOO", str(tmp_path / "zoo"))
    monkeypatch.setenv("DINTS_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")  # so that no table wraps its words
    write_entry(tmp_path / "zoo" / "tiny", entry_fields(), [NETWORK], extra=EXTRA)
    scan_file(tmp_path, random_scan())
    return tmp_path / "zoo"


def segment(zoo: Path, model: str = "tiny") -> Said:
    """Segment the scan; say so in the message if a refusal left a file behind."""
    out = zoo.parent / "out"
    said = run_cli("segment", zoo.parent / "scan.nii.gz", "--model", model, "-o", out, "--engine", "onnx")
    left = list(out.glob("*")) if out.is_dir() and said.code else []
    return Said(said.code, said.out, said.err + "".join(f" LEFT {path.name}" for path in left))


def assert_refused(zoo: Path, code: str, about: str) -> None:
    """Assert that `zoo verify` and `segment` refuse the entry `tiny` by code and file, and that nothing is written."""
    for said in (run_cli("zoo", "verify", "tiny"), segment(zoo)):
        assert said.code == 1
        assert f"[{code}]" in said.err
        assert about in said.err
        assert "LEFT" not in said.err


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def test_an_entry_as_it_was_made_is_verified_and_runs(zoo: Path) -> None:
    said = run_cli("zoo", "verify")
    assert (said.code, said.out) == (0, f"tiny: verified, {len(FILES)} files\n")
    assert segment(zoo).code == 0


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_in_any_file_is_refused_by_the_files_name(zoo: Path, name: str) -> None:
    path = zoo / "tiny" / name
    whole = path.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        damage(path, place)
        assert_refused(zoo, "entry-checksum", name)
        path.write_bytes(whole)
    assert run_cli("zoo", "verify", "tiny").code == 0


def test_a_changed_byte_anywhere_in_the_checksums_themselves_is_refused(zoo: Path) -> None:
    path = zoo / "tiny" / SUMS_FILE
    whole = path.read_bytes()
    for place in range(len(whole)):
        damage(path, place)
        with pytest.raises(EntryError) as caught:
            load_entry("tiny")
        assert caught.value.code in ("entry-checksum", "entry-path"), place
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [*FILES[1:], SUMS_FILE])
def test_a_missing_file_is_refused_by_its_name(zoo: Path, name: str) -> None:
    (zoo / "tiny" / name).unlink()
    assert_refused(zoo, "entry-missing-file", name)


@pytest.mark.parametrize("name", ["extra.txt", ".hidden", "more/extra.bin", f"more/{SUMS_FILE}"])
def test_a_file_without_a_checksum_is_refused_by_its_name(zoo: Path, name: str) -> None:
    (zoo / "tiny" / name).write_bytes(b"")
    assert_refused(zoo, "entry-checksum", name)


@pytest.mark.parametrize("name", [*FILES, SUMS_FILE, "more"])
def test_a_link_in_place_of_a_file_is_refused_even_if_the_bytes_are_right(zoo: Path, name: str) -> None:
    path = zoo / "tiny" / name
    path.rename(zoo.parent / "moved")
    path.symlink_to(zoo.parent / "moved")
    assert_refused(zoo, "entry-path", Path(name).name)


def test_a_pipe_in_an_entry_is_refused_and_not_read(zoo: Path) -> None:
    os.mkfifo(zoo / "tiny" / "pipe")
    assert_refused(zoo, "entry-path", "pipe")


@pytest.mark.parametrize("name", ["../scan.nii.gz", "/etc/passwd", "more/../../secret"])
def test_checksums_of_a_path_outside_are_refused(zoo: Path, name: str) -> None:
    with (zoo / "tiny" / SUMS_FILE).open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    assert_refused(zoo, "entry-path", name)


def test_a_network_that_the_entry_names_but_does_not_hold_is_refused_by_its_name(zoo: Path) -> None:
    shutil.rmtree(zoo / "tiny")
    write_entry(zoo / "tiny", entry_fields(members=[{"onnx": "model.onnx"}, {"onnx": "second.onnx"}]), [NETWORK])
    assert_refused(zoo, "entry-missing-file", "second.onnx")


BAD_NETWORKS = {"external data": outside(NETWORK), "com.example": customised(NETWORK), "damaged": NETWORK[:-3]}


@pytest.mark.parametrize("said", BAD_NETWORKS)
def test_a_network_that_is_not_only_a_network_is_refused_though_its_checksum_is_right(zoo: Path, said: str) -> None:
    (zoo / "tiny" / "model.onnx").write_bytes(BAD_NETWORKS[said])
    sign(zoo / "tiny")
    assert_refused(zoo, "entry-onnx", "tiny/model.onnx")
    assert said in run_cli("zoo", "verify", "tiny").err


def test_weights_that_change_after_the_entry_was_verified_do_not_run(zoo: Path) -> None:
    entry = load_entry("tiny")
    (zoo / "tiny" / "model.onnx").write_bytes(random_network(1).onnx())
    with pytest.raises(EntryError) as caught:
        entry.member_bytes(entry.spec.members[0])
    assert caught.value.code == "entry-checksum"
    assert "model.onnx" in caught.value.message


def test_verify_looks_at_every_entry_and_ends_with_the_worst(zoo: Path) -> None:
    write_entry(zoo / "other", entry_fields("other"), [NETWORK])
    damage(zoo / "tiny" / "model.onnx", 5)
    said = run_cli("zoo", "verify", "--json")
    assert said.code == 1
    assert [(r["name"], r["ok"], r.get("code")) for r in json.loads(said.out)] == [
        ("other", True, None),
        ("tiny", False, "entry-checksum"),
    ]


def own_model(folder: Path, name: str = "mine") -> Path:
    """Write what a user has: an ONNX file and an entry.toml, without checksums."""
    write_entry(folder, entry_fields(name, classes=2), [threshold_network(0.25).onnx()])
    (folder / SUMS_FILE).unlink()
    return folder


def test_a_users_own_network_is_added_and_segments(zoo: Path) -> None:
    scan = random_scan(3, (11, 9, 13))
    path = scan_file(zoo.parent, scan)
    said = run_cli("zoo", "add", own_model(zoo.parent / "my-folder"), "--json")
    assert (said.code, json.loads(said.out)["name"]) == (0, "mine")
    assert sorted(p.name for p in (zoo.parent / "my-folder").iterdir()) == [ENTRY_FILE, "model.onnx"]
    assert run_cli("zoo", "verify", "mine").code == 0
    for engine in ("onnx", "openvino"):
        out = zoo.parent / f"{engine}.nii.gz"
        said = run_cli("segment", path, "--model", "mine", "-o", out, "--engine", engine, "--json")
        labels = np.asanyarray(nibabel.load(out).dataobj)
        assert np.array_equal(labels, scan.data[0] > 0.25)
        assert json.loads(said.out)["cases"][0]["structures"][0]["volume_ml"] == round(labels.sum() / 1000, 4)


def broken_checksum(folder: Path) -> None:
    sign(folder)
    damage(folder / "model.onnx", 9)


def with_external_data(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(outside(NETWORK))


def with_link(folder: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")


def without_network(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def with_bad_description(folder: Path) -> None:
    (folder / ENTRY_FILE).write_text("name = 'mine'\n")


def without_description(folder: Path) -> None:
    (folder / ENTRY_FILE).unlink()


DAMAGES: dict[Callable[[Path], None], str] = {
    broken_checksum: "entry-checksum",
    with_external_data: "entry-onnx",
    with_link: "entry-path",
    without_network: "entry-missing-file",
    with_bad_description: "entry-invalid",
    without_description: "entry-missing-file",
}


@pytest.mark.parametrize("spoil", DAMAGES, ids=lambda spoil: spoil.__name__)
def test_a_damaged_source_leaves_nothing_in_the_zoo(zoo: Path, spoil: Callable[[Path], None]) -> None:
    source = own_model(zoo.parent / "source")
    spoil(source)
    said = run_cli("zoo", "add", source)
    assert said.code == 1
    assert f"[{DAMAGES[spoil]}]" in said.err
    assert [path for path in (zoo.parent / "state").rglob("*") if path.name != "zoo"] == []


def test_a_full_disk_while_adding_leaves_nothing_in_the_zoo(zoo: Path) -> None:
    source = own_model(zoo.parent / "source")
    (source / "card.md").write_bytes(b"x" * 200_000)
    with full_disk(100_000):
        said = run_cli("zoo", "add", source)
    assert said.code == 1
    assert "[disk-full]" in said.err
    assert list((zoo.parent / "state" / "zoo").iterdir()) == []
    assert run_cli("zoo", "add", source).code == 0


def test_a_name_that_is_taken_is_not_added_again(zoo: Path) -> None:
    assert run_cli("zoo", "add", own_model(zoo.parent / "source")).code == 0
    for source in (zoo.parent / "source", own_model(zoo.parent / "other", "tiny")):
        said = run_cli("zoo", "add", source)
        assert said.code == 2
        assert "[entry-exists]" in said.err


def test_only_added_entries_can_be_removed(zoo: Path) -> None:
    run_cli("zoo", "add", own_model(zoo.parent / "source"))
    for name in ("tiny", "unknown", "../zoo/mine", "../../zoo/tiny", "", "."):
        said = run_cli("zoo", "remove", name)
        assert said.code == 2
        assert "[entry-unknown]" in said.err
    assert run_cli("zoo", "remove", "mine").code == 0
    assert list((zoo.parent / "state" / "zoo").iterdir()) == []
    assert (zoo / "tiny" / "model.onnx").is_file()
    assert run_cli("zoo", "verify", "mine").code == 2


def test_both_folders_are_listed_with_their_origin(zoo: Path) -> None:
    run_cli("zoo", "add", own_model(zoo.parent / "source"))
    rows = json.loads(run_cli("zoo", "list", "--json").out)
    assert [(row["name"], row["origin"]) for row in rows] == [("mine", "added"), ("tiny", "shipped")]
    shown = json.loads(run_cli("zoo", "show", "mine", "--json").out)
    assert shown["folder"] == str(zoo.parent / "state" / "zoo" / "mine")


def test_a_state_folder_of_somebody_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0)
    code = """
import os
from dints_deploy.catalog.catalog import entry_folders
from dints_deploy.errors import EntryError
if os.geteuid() == 0:
    os.setuid(65534)  # root may look everywhere
try:
    entry_folders()
except EntryError as error:
    print(error.code)
"""
    environment = os.environ | {"DINTS_STATE": str(tmp_path / "state")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "state-permissions\n"


def test_a_recipe_entry_says_that_it_has_no_weights(zoo: Path) -> None:
    write_entry(zoo / "paper", entry_fields("paper", members=[], genotype="g.json"), extra={"g.json": b"{}"})
    assert run_cli("zoo", "verify", "paper").code == 0
    assert "recipe" in run_cli("zoo", "list").out
    assert [row["members"] for row in json.loads(run_cli("zoo", "list", "--json").out)] == [0, 1]
    for said in (segment(zoo, "paper"), run_cli("export", "paper", "--onnx", "-o", zoo.parent / "out")):
        assert said.code == 2
        assert "[entry-has-no-weights]" in said.err
    said = run_cli("segment", zoo.parent / "scan.nii.gz", "-o", zoo.parent / "o", "--engine", "onnx", "--json")
    assert json.loads(said.out)["cases"][0]["model"]["entry"] == "tiny"


def labels_of(path: Path) -> Volume:
    """Return the voxels of a written label map."""
    image = nibabel.load(path)
    return Volume(np.asanyarray(image.dataobj)[np.newaxis], image.affine)


@pytest.mark.parametrize("tta", [[], ["i"], ["k", "i"], ["i", "j", "k"]], ids="".join)
def test_members_and_mirrored_copies_are_averaged_before_the_label_is_decided(zoo: Path, tta: list[str]) -> None:
    networks = [random_network(seed) for seed in (5, 6)]
    fields = entry_fields("both", ensemble=2, tta=tta)
    write_entry(zoo / "both", fields, [network.onnx() for network in networks])
    scan = random_scan(7)  # exactly one window: no blending stands between the logits and the labels
    out = zoo.parent / "both.nii.gz"
    said = run_cli("segment", scan_file(zoo.parent, scan), "--model", "both", "-o", out, "--engine", "onnx")
    assert said.code == 0

    batch = scan.data[np.newaxis].astype(np.float64)
    total, single = np.zeros((3, *scan.shape)), networks[0].logits(batch)[0].argmax(0)
    for subset in range(2 ** len(tta)):
        axes = tuple({"i": 2, "j": 3, "k": 4}[axis] for n, axis in enumerate(tta) if subset >> n & 1)
        for network in networks:
            total += np.flip(network.logits(np.flip(batch, axes)), axes)[0]
    margin = np.sort(total, axis=0)
    clear = margin[-1] - margin[-2] > 1e-4
    labels = labels_of(out).data[0]
    assert clear.mean() > 0.99
    assert np.array_equal(labels[clear], total.argmax(0)[clear])
    assert (labels != single).mean() > 0.05
