"""The appliance as a hospital gets it: the offline bundle in an empty environment, with no network and no torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.real_study import write_study

ROOT = Path(__file__).parents[2]
SCAN = ROOT / "tests" / "data" / "Task04_Hippocampus" / "imagesTr" / "hippocampus_038.nii.gz"
NAMESPACE = ("unshare", "--map-root-user", "--net", "--mount")

TRAP = """
mount -t tmpfs tmpfs /run && echo 'nameserver 198.51.100.53' >/run/resolv.conf
mount --bind /run/resolv.conf /etc/resolv.conf
ip link set lo up
ip link add trap type veth peer name end
echo 1 >/proc/sys/net/ipv6/conf/trap/disable_ipv6
ip address add 192.0.2.1/24 dev trap
ip link set trap up && ip link set end up
ip neighbour add 192.0.2.2 lladdr 02:00:00:00:00:02 dev trap nud permanent
ip route add default via 192.0.2.2
sent() { awk '$1 == "trap:" { print "sent", $11 }' /proc/net/dev; }
"""
"""A namespace whose every way out ends in a counter: a connection or a name that is looked up shows as a packet."""

OFFLINE = """
P={bare}/bin
$P/dints-deploy zoo show hippocampus
$P/dints-deploy doctor || true
$P/dints-deploy segment {scan} -o nifti --engine openvino --to nifti,preview,html
$P/dints-deploy dicom inspect study
$P/dints-deploy segment study -o out --engine onnx --to dicom-seg,dicom-sr,rtstruct,dicom-sc,html
$P/dints-deploy verify out/*.seg.dcm --source study
$P/dints-deploy init -o appliance.toml --data-dir "$PWD/data" --caller MR1 --folder "$PWD/incoming" --pacs none
sed -i 's/^settle_seconds = 10 /settle_seconds = 0.2 /; s/^quiet_seconds = 60 /quiet_seconds = 2 /' appliance.toml
$P/dints-deploy route test study --config appliance.toml
$P/dints-deploy watch --config appliance.toml &
n=0; until ls data-results/*/*.dcm 2>/dev/null; do n=$((n+1)); test $n -lt 300; sleep 0.2; done
$P/dints-deploy jobs list --config appliance.toml
sleep 15
kill $!; wait $!
$P/dints-deploy audit verify --config appliance.toml
sent
$P/python -c 'import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("198.51.100.1", 9))'
sent
$P/python -c 'import socket; socket.setdefaulttimeout(1); socket.getaddrinfo("example.org", 80)' 2>/dev/null || true
sent
"""
"""What a hospital runs. The daemon is kept for a while after its work: an engine that reports its use does so then."""


def in_namespace() -> tuple[str, ...]:
    """Return how a command is run without a network; nothing where this machine does not let us."""
    done = subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False)
    return NAMESPACE if done.returncode == 0 else ()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked archive of `make bundle`."""
    folder = tmp_path_factory.mktemp("bundle")
    command = [sys.executable, "-m", "release.bundle", str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    with tarfile.open(done.stdout.strip()) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def bare(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that the bundle was installed into, without a network where that can be had."""
    target = tmp_path_factory.mktemp("bare") / "dints-deploy"
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
    command = [*in_namespace(), str(bundle / "install.sh"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_wheel_holds_the_two_packages_the_zoo_and_the_recipes_only(bundle: Path) -> None:
    with zipfile.ZipFile(next(bundle.glob("wheels/dints_deploy-*.whl"))) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dints_deploy", "dints_search"}
    entries = {name.split("/")[2] for name in names if name.startswith("dints_deploy/_zoo/")}
    assert entries == {path.name for path in (ROOT / "zoo").iterdir() if path.is_dir()}
    assert "dints_deploy/_zoo/hippocampus/model.onnx" in names
    recipes = {name.rpartition("/")[2] for name in names if name.startswith("dints_search/_recipes/")}
    assert recipes == {path.name for path in (ROOT / "search" / "recipes").iterdir()}
    kinds = {
        Path(name).suffix for name in names if not name.startswith(("dints_deploy/_zoo/", "dints_search/_recipes"))
    }
    assert kinds <= {".py", ".typed", ".sql", ".toml", ".html", ".css", ".js", ".json", ".txt", ""}
    assert [name for name in names if "tests" in name or name.endswith((".nii.gz", ".dcm", ".pyc"))] == []


def test_version_is_the_newest_of_the_changelog(bundle: Path, bare: Path) -> None:
    newest = next(
        line.split()[1] for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    )
    said = subprocess.run([bare / "bin" / "dints-deploy", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == newest
    assert bundle.name.startswith(f"dints-deploy-{newest}-")


def test_source_distribution_builds_a_wheel_of_the_same_files(bundle: Path, tmp_path: Path) -> None:
    """What git holds and the sdist takes is enough to build from: nothing of the checkout is missed."""
    build = "import hatchling.build, sys; print(hatchling.build.build_{}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build.format("sdist"), str(tmp_path)], cwd=ROOT, check=True,
                          capture_output=True, text=True)  # fmt: skip
    with tarfile.open(tmp_path / done.stdout.strip()) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert not (source / "tests" / "data").exists()
    subprocess.run([sys.executable, "-c", build.format("wheel"), str(tmp_path)], cwd=source, check=True,
                   capture_output=True)  # fmt: skip
    names = []
    for folder in (bundle / "wheels", tmp_path):
        with zipfile.ZipFile(next(folder.glob("dints_deploy-*.whl"))) as wheel:
            names.append(sorted(wheel.namelist()))
    assert names[0] == names[1]


def test_bill_of_materials_names_every_wheel_with_its_licence(bundle: Path) -> None:
    bill = json.loads((bundle / "sbom.cdx.json").read_text())
    everything = [bill["metadata"]["component"], *bill["components"]]
    assert len(everything) == len(list(bundle.glob("wheels/*.whl")))
    unknown = [one["name"] for one in everything if "unknown" in json.dumps(one["licenses"])]
    assert unknown == []
    assert all(one["hashes"][0]["alg"] == "SHA-256" for one in everything)


def test_changed_wheel_is_not_installed(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / bundle.name
    shutil.copytree(bundle, copy, copy_function=os.link)
    victim = next(copy.glob("wheels/rich-*.whl"))
    data = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(data[:-1] + b"x")
    done = subprocess.run([copy / "install.sh", tmp_path / "new"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"wheels/{victim.name}: FAILED" in done.stdout
    assert not (tmp_path / "new").exists()


def test_bare_environment_has_no_torch_and_segments_a_real_scan(bare: Path, tmp_path: Path) -> None:
    for package in ("torch", "monai"):
        gone = subprocess.run([bare / "bin" / "python", "-c", f"import {package}"], capture_output=True, check=False)
        assert gone.returncode != 0
    command = [str(bare / "bin" / "dints-deploy"), "segment", str(SCAN), "-o", str(tmp_path), "--json"]
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


def test_no_command_of_the_appliance_sends_a_packet_out(bare: Path, tmp_path: Path) -> None:
    allowed = subprocess.run([*NAMESPACE, "sh", "-euc", TRAP], capture_output=True, check=False)
    if allowed.returncode != 0:
        pytest.skip("no right to make a network namespace with a link in it")
    write_study(SCAN, tmp_path / "study", seed=1)
    shutil.copytree(tmp_path / "study", tmp_path / "incoming")
    script = TRAP + OFFLINE.format(bare=bare, scan=SCAN)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "DINTS_STATE": str(tmp_path / "state")}
    done = subprocess.run([*NAMESPACE, "sh", "-euc", script], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, check=False, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    sent = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("sent ")]
    assert sent[0] == 0, done.stdout
    assert 0 < sent[1] < sent[2], "the trap counts a datagram, and a name that is looked up"
    assert len(list((tmp_path / "data-results").glob("*/*.dcm"))) == 2


def test_workshop_commands_say_what_to_install(bare: Path) -> None:
    words = ["retrain", "--genotype", "g", "--task", "4", "--data", "d", "--out", "o"]
    done = subprocess.run([bare / "bin" / "dints-deploy", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "extra-missing" in done.stderr
    assert "pip install 'dints-deploy[search]'" in done.stderr
