"""Export with proof: what is installed is used, and nothing that was changed, cut or made elsewhere is."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dints_deploy.catalog.catalog import LoadedEntry, load_entry
from dints_deploy.catalog.entry import ReducedLimits
from dints_deploy.errors import EngineError, OutputError
from dints_deploy.files import make_private_folder
from dints_deploy.runtime.certificate import (
    SECRET_FILE,
    Target,
    certificate_path,
    engines_folder,
    install,
    read_certificate,
)
from dints_deploy.runtime.certified import choose_networks
from dints_deploy.runtime.engine import engine_version
from dints_deploy.runtime.export import Made, Proof, export, proofs_of
from dints_deploy.runtime.onnx_engine import plan_folder
from tests.small_disk import fill, small_disk
from tests.tiny_entry import (
    WINDOW,
    TinyNetwork,
    entry_fields,
    full_disk,
    random_network,
    random_scan,
    run_cli,
    scan_file,
    write_entry,
)

LOOSE = {"min_label_agreement": 0.8, "min_dice": 0.5, "min_hostile_label_agreement": 0.5}
OPENVINO = Target(engine="openvino", precision="int8", device="cpu")


def deep_network(seed: int) -> TinyNetwork:
    """Return eight convolutions, so that there are some between those at the ends."""
    rng = np.random.default_rng(seed)
    layers = []
    for n, (before, after) in enumerate(pairwise([1, 4, 4, 4, 4, 4, 4, 4, 3])):
        edge = 3 if n in (0, 3) else 1
        weight = rng.normal(size=(after, before, edge, edge, edge)) / np.sqrt(before * edge**3 / 2)
        layers.append((weight.astype(np.float32), rng.normal(size=after).astype(np.float32) / 4))
    return TinyNetwork(tuple(layers))


def inputs(network: TinyNetwork, *, wrong: float = 0.0) -> bytes:
    """Return `parity_inputs.npz` of a network; `wrong` is added to the logits of the second class."""
    windows = np.random.default_rng(5).normal(size=(2, 1, *WINDOW)).astype(np.float32)
    logits = network.logits(windows).astype(np.float32)
    logits[:, 1] += wrong
    buffer = io.BytesIO()
    np.savez_compressed(buffer, windows=windows, logits0=logits)
    return buffer.getvalue()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one entry, `tiny`, that has parity windows."""
    monkeypatch.setenv("DINTS_ZOO", str(tmp_path / "zoo"))
    monkeypatch.setenv("DINTS_STATE", str(tmp_path / "state"))
    add_entry(tmp_path, "tiny", deep_network(0))
    return tmp_path


def add_entry(place: Path, name: str, network: TinyNetwork, *, wrong: float = 0.0) -> None:
    """Write an entry with parity windows and wide limits for reduced precision."""
    fields = entry_fields(name, parity={"reduced": LOOSE})
    extra = {"parity_inputs.npz": inputs(network, wrong=wrong)}
    write_entry(place / "zoo" / name, fields, [network.onnx()], extra=extra)


@pytest.fixture
def entry(place: Path) -> LoadedEntry:
    return load_entry("tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An INT8 network for OpenVINO, proven and not installed yet."""
    place = tmp_path_factory.mktemp("made")
    add_entry(place, "tiny", deep_network(0))
    entry = load_entry(place / "zoo" / "tiny")
    [made] = export(entry.spec, proofs_of(entry), OPENVINO, threads=1)
    return made


@pytest.fixture
def exported(entry: LoadedEntry, made: Made) -> Path:
    """The same, installed on this machine; the path of its certificate."""
    return install(made.certificate, made.artefact)


def left(place: Path) -> list[str]:
    """Return the names of all files of the state folder."""
    state = place / "state"
    return sorted(path.name for path in state.rglob("*") if path.is_file()) if state.exists() else []


@pytest.mark.parametrize(
    ("flag", "precision", "operator"),
    [("--openvino", "int8", "QuantizeLinear"), ("--onnx", "fp16", "Cast"), ("--openvino", "bf16", None)],
)
def test_what_was_exported_is_what_segment_runs(place: Path, flag: str, precision: str, operator: str | None) -> None:
    said = run_cli("export", "tiny", flag, "--precision", precision, "-o", place / "copies", "--json")
    if precision == "bf16" and said.code != 0:
        assert "[engine-failed]" in said.err  # a processor on which OpenVINO has no bfloat16 at all
        assert left(place) == []
        return
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert len(document["certificates"]) == 1
    [measured] = document["measured"]
    assert measured["comparison"]["precision"] == precision
    assert measured["kept"]["min_dice"] == 0.5
    assert [Path(file).name for file in document["files"]] == (
        [f"tiny-model{flag[1:]}-{precision}.onnx"] if operator else []
    )
    for file in document["files"]:
        assert operator in {node.op_type for node in onnx.load(file).graph.node}
    scan = scan_file(place, random_scan(3))
    done = run_cli("segment", scan, "--precision", precision, "-o", place / "x.nii.gz", "--json")
    assert done.code == 0, done.err
    [case] = json.loads(done.out)["cases"]
    assert case["engine"]["precision"] == precision
    assert case["engine"]["name"] == flag.removeprefix("--")
    assert "certified on this machine" in case["engine"]["why"]
    assert case["parity"] == "certified on this machine"


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_a_precision_without_certificate_is_refused_with_the_command_that_makes_one(
    place: Path, precision: str
) -> None:
    said = run_cli("segment", scan_file(place, random_scan(1)), "--precision", precision, "-o", place / "x.nii.gz")
    assert said.code == 1
    assert said.err.rstrip().endswith("[no-certificate]")
    engine = "onnx" if precision == "fp16" else "openvino"
    words = ["--precision", precision, "--engine", engine, "-o", place / "x.nii.gz"]
    asked = run_cli("segment", place / "scan.nii.gz", *words)
    assert f"dints-deploy export tiny --{engine} --precision {precision}" in asked.err
    assert not (place / "x.nii.gz").exists()


def change_figure(path: Path) -> None:
    """Make the certificate say that the labels agree better than they do."""
    document = json.loads(path.read_text())
    document["comparison"]["max_abs_logit"] /= 2
    path.write_text(json.dumps(document))


def change_limit(path: Path) -> None:
    document = json.loads(path.read_text())
    document["kept"]["min_dice"] = 0.25
    path.write_text(json.dumps(document))


def add_key(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"approved": True}))


def cut_certificate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def another_key(path: Path) -> None:
    (path.parent / SECRET_FILE).write_bytes(bytes(32))


def no_key(path: Path) -> None:
    (path.parent / SECRET_FILE).unlink()


def short_key(path: Path) -> None:
    (path.parent / SECRET_FILE).write_bytes(b"x")


def network_of(path: Path) -> Path:
    [found] = path.parent.glob("*.onnx")
    return found


def cut_network(path: Path) -> None:
    network_of(path).write_bytes(network_of(path).read_bytes()[:-1])


def no_network(path: Path) -> None:
    network_of(path).unlink()


def other_network(path: Path) -> None:
    network_of(path).write_bytes(random_network(1).onnx())


def open_certificate(path: Path) -> None:
    path.chmod(0o666)


def open_folder(path: Path) -> None:
    path.parent.chmod(0o770)


def readable_key(path: Path) -> None:
    (path.parent / SECRET_FILE).chmod(0o644)


def linked_certificate(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def foreign_owner(path: Path) -> None:
    os.chown(path, 4321, 4321)


DAMAGE: dict[Callable[[Path], None], str] = {
    change_figure: "certificate-invalid",
    change_limit: "certificate-invalid",
    add_key: "certificate-invalid",
    cut_certificate: "certificate-invalid",
    another_key: "certificate-invalid",
    no_key: "certificate-invalid",
    short_key: "certificate-invalid",
    cut_network: "artefact-damaged",
    no_network: "artefact-damaged",
    other_network: "artefact-damaged",
    open_certificate: "state-permissions",
    open_folder: "state-permissions",
    readable_key: "state-permissions",
    linked_certificate: "state-permissions",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_nothing_that_was_changed_is_used(entry: LoadedEntry, exported: Path, damage: Callable[[Path], None]) -> None:
    choose_networks(entry, windows=1, engine="openvino", precision="int8")
    damage(exported)
    for engine in ("openvino", "auto"):
        with pytest.raises(EngineError) as caught:
            choose_networks(entry, windows=1, engine=engine, precision="int8")
        assert caught.value.code == DAMAGE[damage]
        assert caught.value.message.startswith("expected ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_certificate_of_another_user_is_not_used(entry: LoadedEntry, exported: Path) -> None:
    foreign_owner(exported)
    with pytest.raises(EngineError) as caught:
        choose_networks(entry, windows=1, engine="openvino", precision="int8")
    assert caught.value.code == "state-permissions"


def resealed(path: Path, **changes: Any) -> None:
    """Install the certificate again with other content, sealed as export would."""
    certificate = read_certificate(path)
    comparison = certificate.comparison.model_copy(update=changes.pop("comparison", {}))
    data = network_of(path).read_bytes()
    install(certificate.model_copy(update={"comparison": comparison, **changes}), data)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"comparison": {"version": "2025.1.0"}}, "2025.1.0"), ({"machine": "Another; avx2"}, "Another; avx2")],
)
def test_a_certificate_of_another_engine_version_or_processor_is_stale(
    entry: LoadedEntry, exported: Path, changes: dict[str, Any], word: str
) -> None:
    resealed(exported, **changes)
    with pytest.raises(EngineError) as caught:
        choose_networks(entry, windows=1, engine="openvino", precision="int8")
    assert caught.value.code == "certificate-stale"
    assert word in caught.value.message
    assert "dints-deploy export tiny --openvino --precision int8" in caught.value.message


def test_a_plan_that_may_not_be_used_is_left_aside_with_the_reason(entry: LoadedEntry) -> None:
    _, _, why = choose_networks(entry, windows=1, device="cuda:0")
    assert why == "the engine for CUDA devices"
    plan = Target(engine="onnx-trt", precision="fp32", device="cuda:0")
    path = certificate_path(entry.digests["model.onnx"], plan)
    make_private_folder(make_private_folder(path.parents[1]) / path.parent.name)
    path.write_bytes(b"{}")
    chosen, networks, why = choose_networks(entry, windows=1, device="cuda:0")
    assert (chosen.name, networks) == ("onnx", [entry.member_bytes(entry.spec.members[0])])
    assert why.startswith("the engine for CUDA devices; a plan was left aside: expected")


def test_limits_that_were_made_stricter_after_export_hold(entry: LoadedEntry, exported: Path) -> None:
    strict = entry.spec.parity.model_copy(update={"reduced": ReducedLimits(min_label_agreement=1.5)})
    stricter = replace(entry, spec=entry.spec.model_copy(update={"parity": strict}))
    with pytest.raises(EngineError) as caught:
        choose_networks(stricter, windows=1, engine="openvino", precision="int8")
    assert caught.value.code == "certificate-stale"
    assert "min_label_agreement of 1.5" in caught.value.message


def test_a_certificate_counts_only_for_its_own_weights(place: Path, entry: LoadedEntry, exported: Path) -> None:
    add_entry(place, "other", deep_network(9))
    theirs = load_entry("other")
    with pytest.raises(EngineError) as caught:
        choose_networks(theirs, windows=1, engine="openvino", precision="int8")
    assert caught.value.code == "no-certificate"
    shutil.copyfile(exported, certificate_path(theirs.digests["model.onnx"], OPENVINO))  # the seal itself is whole
    with pytest.raises(EngineError) as caught:
        choose_networks(theirs, windows=1, engine="openvino", precision="int8")
    assert caught.value.code == "certificate-invalid"


def test_export_fails_above_the_limits_and_leaves_nothing(place: Path) -> None:
    for name, wrong in (("shifted", 9.0), ("not-a-number", np.nan)):
        add_entry(place, name, deep_network(0), wrong=wrong)
        for flags in (["--openvino"], ["--onnx", "--precision", "fp16"], ["--openvino", "--precision", "int8"]):
            said = run_cli("export", name, *flags, "-o", place / "copies")
            assert said.code == 1
            assert said.err.rstrip().endswith("[parity-failed]"), said.err
            assert "min_label_agreement" in said.err
    assert left(place) == []
    assert not (place / "copies").exists()


def test_an_entry_without_parity_windows_cannot_be_proven(place: Path) -> None:
    write_entry(place / "zoo" / "bare", entry_fields("bare"), [random_network(0).onnx()])
    said = run_cli("export", "bare", "--openvino", "--precision", "int8")
    assert (said.code, said.err.rstrip().rpartition(" ")[2]) == (1, "[entry-missing-file]")


@pytest.mark.parametrize(
    "words",
    [
        ["--onnx", "--openvino"],
        [],
        ["--openvino", "--precision", "fp8"],
        ["--onnx", "--precision", "bf16"],
        ["--openvino", "--device", "cuda:0"],
        ["--trt", "--device", "cpu"],
    ],
)
def test_a_wrong_call_is_named(place: Path, words: list[str]) -> None:
    said = run_cli("export", "tiny", *words)
    assert (said.code, said.err.rstrip().rpartition(" ")[2]) == (2, "[usage]"), said.err
    assert left(place) == []


def test_exporting_again_replaces_and_keeps_no_old_network(place: Path, exported: Path) -> None:
    before = left(place)
    certificate = read_certificate(exported)
    install(certificate, random_network(4).onnx())
    assert len(left(place)) == len(before)
    assert network_of(exported).read_bytes() == random_network(4).onnx()


def test_two_engines_share_one_network_and_lose_it_only_together(
    entry: LoadedEntry, exported: Path, made: Made
) -> None:
    theirs = made.certificate.comparison.model_copy(update={"engine": "onnx", "version": engine_version("onnx")})
    again = made.certificate.model_copy(update={"comparison": theirs})
    install(again, made.artefact)
    shared = network_of(exported)
    install(made.certificate, random_network(4).onnx())
    assert shared.exists()
    choose_networks(entry, windows=1, engine="onnx", precision="int8")
    install(again, random_network(4).onnx())
    assert not shared.exists()


def test_auto_takes_the_fastest_that_is_certified_and_says_so(entry: LoadedEntry, exported: Path, made: Made) -> None:
    theirs = made.certificate.comparison.model_copy(update={"engine": "onnx", "version": engine_version("onnx")})
    for seconds, fastest in ((1e-9, "onnx"), (1e9, "openvino")):
        fields = {"comparison": theirs, "seconds_per_window": seconds}
        install(made.certificate.model_copy(update=fields), made.artefact)
        engine, _, why = choose_networks(entry, windows=1, precision="int8")
        assert engine.name == fastest
        assert "fastest of 2 certified on this machine" in why


def test_the_folder_and_what_is_in_it_belong_to_the_owner_alone(place: Path, exported: Path) -> None:
    for path in (place / "state", engines_folder(), *engines_folder().iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_full_disk_while_exporting_leaves_no_part_and_the_old_pair(
    entry: LoadedEntry, exported: Path, made: Made
) -> None:
    before = {path.name: path.read_bytes() for path in engines_folder().iterdir()}
    for limit, data in ((100_000, bytes(300_000)), (200, b"small")):  # in the network; in the certificate
        with full_disk(limit), pytest.raises(OutputError) as caught:
            install(made.certificate, data)
        assert caught.value.code == "disk-full"
        now = {path.name: path.read_bytes() for path in engines_folder().iterdir()}
        assert {name: now[name] for name in before} == before
        assert [name for name in now if name.startswith(".partial")] == []
    choose_networks(entry, windows=1, engine="openvino", precision="int8")


@pytest.fixture
def full_disk_of_a_machine(place: Path) -> Iterator[Path]:
    with small_disk(place / "state", kilobytes=64) as folder:
        yield folder


def test_a_real_full_disk_is_named(full_disk_of_a_machine: Path, made: Made) -> None:
    fill(full_disk_of_a_machine)
    with pytest.raises(OutputError) as caught:
        install(made.certificate, made.artefact)
    assert caught.value.code == "disk-full"
    assert list(full_disk_of_a_machine.glob("engines/*")) == []


def test_a_plan_of_onnx_runtime_is_loaded_from_a_folder_of_the_owner_alone_and_through_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINTS_STATE", str(tmp_path / "state"))
    plan = plan_folder() / "a.engine"
    plan.write_bytes(b"plan")
    plan.chmod(0o664)  # as ONNX Runtime leaves it under a usual umask
    plan.parent.chmod(0o755)
    assert plan_folder() == plan.parent
    assert stat.S_IMODE(plan.parent.stat().st_mode) == 0o700
    (plan.parent / "b.engine").symlink_to(plan)
    with pytest.raises(EngineError) as caught:
        plan_folder()
    assert caught.value.code == "state-permissions"


@pytest.mark.parametrize(("there", "used"), [(1, 1), (2, 2), (3, 2), (6, 4)])
def test_int8_is_proven_on_more_windows_than_it_was_calibrated_on(there: int, used: int) -> None:
    windows = np.arange(there, dtype=np.float32).reshape(there, 1, 1, 1, 1)
    proof = Proof("model.onnx", b"", windows, windows)
    assert np.array_equal(proof.calibration, windows[:used])


def test_int8_takes_the_more_careful_form_where_the_quicker_misses_a_limit(entry: LoadedEntry, made: Made) -> None:
    assert made.artefact is not None
    better = made.certificate.comparison.label_agreement + 1e-6
    reduced = entry.spec.parity.reduced.model_copy(update={"min_label_agreement": better})
    spec = entry.spec.model_copy(update={"parity": entry.spec.parity.model_copy(update={"reduced": reduced})})
    [careful] = export(spec, proofs_of(entry), OPENVINO, threads=1)
    assert careful.artefact is not None
    assert careful.certificate.comparison.label_agreement >= better
    quantised = [
        sum(node.op_type == "QuantizeLinear" for node in onnx.load_from_string(form).graph.node)
        for form in (made.artefact, careful.artefact)
    ]
    assert quantised == [8 - 1 - 1, 8 - 3 - 3]


def test_int8_that_misses_a_limit_and_has_no_more_careful_form_tells_the_figures(place: Path) -> None:
    layers = deep_network(0).layers
    add_entry(place, "middling", TinyNetwork((*layers[:3], *layers[-2:])), wrong=9.0)
    said = run_cli("export", "middling", "--openvino", "--precision", "int8")
    assert "[parity-failed]" in said.err
    assert "min_label_agreement of 0.8" in said.err
    assert "found none" in said.err  # a form with three at each end
    assert "trying again with more convolutions in floating point" in said.err
    assert left(place) == []


def test_int8_of_a_network_without_inner_convolutions_is_not_fp32_under_another_name(place: Path) -> None:
    add_entry(place, "shallow", random_network(0))
    said = run_cli("export", "shallow", "--openvino", "--precision", "int8")
    assert (said.code, said.err.rstrip().rpartition(" ")[2]) == (1, "[engine-failed]")
    assert left(place) == []


WATCHED = """
import sys
seen = []
events = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "os.fork", "subprocess.Popen")
sys.addaudithook(lambda event, args: seen.append(event) if event in events else None)
from dints_deploy.cli.main import app
for words in (["--openvino", "--precision", "int8"], ["--onnx", "--precision", "fp16"]):
    try:
        app(["export", "tiny", *words, "--json"])
    except SystemExit as done:
        print("exit", done.code or 0)
print("seen", sorted(set(seen)), [name for name in ("torch", "monai", "nncf") if name in sys.modules])
"""


def test_exporting_opens_no_connection_and_needs_no_torch(place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("exit", "seen"))]
    assert lines == ["exit 0", "exit 0", "seen [] []"], done.stdout
