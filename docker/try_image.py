"""Try a built image: its labels, a real scan without a network, the daemon and an Orthanc (run by build.sh, as root).

buildah inspect --type image NAME | python -m docker.try_image runtime MOUNTED_ROOT [--record] [--fact NAME=WORDS]

A container is made here of namespaces: a root that cannot be written, the image's own user, no new privileges. With
--record the figures, and the facts that build.sh names, are written into benchmarks/results/image_NAME.json; what an
earlier call recorded and this one does not say is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.machine import read, write
from dints_deploy.dicom.network import Remote, send
from docker.parts import MEBIBYTE, parts
from tests.peers import Orthanc, free_port, orthanc, wait_until
from tests.real_study import write_study

HERE = Path(__file__).parent
SCAN = HERE.parent / "tests" / "data" / "Task04_Hippocampus" / "imagesTr" / "hippocampus_038.nii.gz"
MOST_BYTES = 900 * MEBIBYTE
READY_SECONDS = 5.0
RESULTS = 3
"""Objects of a study: SEG, SR and secondary capture."""


@dataclass(frozen=True)
class Image:
    """An image that is mounted.

    Attributes:
        config: what it says of itself, in Docker's words.
    """

    root: Path
    config: Mapping[str, Any]

    def command(self, *words: object, mounts: Mapping[Path, str], network: bool = True) -> list[str]:
        """Return a command of the host that runs one of the image.

        Args:
            mounts: folder of the host -> folder of the container; those below /data and /etc cannot be written.
            network: with the host's; otherwise without any route.
        """
        binds = "".join(
            f'mount --bind {source} "$R{target}"\n'
            + (f'mount -o remount,bind,ro "$R{target}"\n' if target.startswith(("/mnt/in", "/etc")) else "")
            for source, target in mounts.items()
        )
        script = f"""
R={self.root}
mount --bind "$R" "$R" && mount -o remount,bind,ro "$R"
mount -t proc proc "$R/proc"
mount --rbind /dev "$R/dev"
mount -t tmpfs -o mode=1777,nosuid,nodev,noexec tmpfs "$R/tmp"
mount -t tmpfs -o mode=755 tmpfs "$R/mnt" && mkdir "$R/mnt/in" "$R/mnt/out"
{binds}
exec setpriv --no-new-privs chroot --userspec={self.config["User"]} --groups= "$R" "$@"
"""
        spaces = ["--mount", "--pid", "--ipc", "--fork", "--kill-child", *([] if network else ["--net"])]
        environment = ["env", "-i", *self.config["Env"], "HOME=/var/lib/dints-deploy"]
        return ["unshare", *spaces, "sh", "-euc", script, "sh", *environment, *map(str, words)]

    def run(self, *words: object, mounts: Mapping[Path, str], network: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the image."""
        command = self.command(*words, mounts=mounts, network=network)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


Facts = Iterator[tuple[str, str]]
"""What was found: a few words, and the figure."""


def main() -> None:
    """Try the image that is named; end with an AssertionError where it is not what it should be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("root", type=Path)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--fact", action="append", default=[])
    words = parser.parse_args()
    image = Image(words.root, json.load(sys.stdin)["Docker"]["config"])
    found = dict(fact.split("=", 1) for fact in words.fact)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for name, text in tried(words.kind, image, Path(folder)):
            print(f"          {name}: {text}", flush=True)
            found[name] = text
    if words.record:
        print(record(words.kind, image, found))


def tried(kind: str, image: Image, folder: Path) -> Facts:
    """Try everything that an image of this kind must do, and yield what was found."""
    yield from check_labels(image)
    if kind == "search":
        yield from try_search(image)
        return
    yield from check_contents(image)
    yield from try_scan(image, folder)
    yield from try_daemon(image, folder)


def record(kind: str, image: Image, found: Mapping[str, str]) -> Path:
    """Write what was found, and the largest parts, where benchmarks.report looks for it."""
    before = (read(f"image_{kind}") or {}).get("facts", {})
    largest = [(name, f"{size / MEBIBYTE:.0f}") for name, size in parts(image.root).items() if size > 10 * MEBIBYTE]
    table = {"about": "The largest parts, unpacked:", "columns": ["part", "MB"], "rows": largest}
    title = f"The {kind} image"
    about = {"title": title, "page": "images", "command": f"docker/build.sh {kind}"}
    return write(f"image_{kind}", {**about, "tables": [table], "facts": {**before, **found}})


def check_labels(image: Image) -> Facts:
    """Check what the image says of itself."""
    labels = {key.rpartition(".")[2]: value for key, value in image.config["Labels"].items()}
    assert {"title", "description", "licenses", "version", "revision", "created"} <= labels.keys(), labels
    assert "unknown" not in labels.values(), labels
    assert image.config["User"] == "10001:10001"
    yield "labels", ", ".join(f"{key} {labels[key]}" for key in ("title", "version", "revision"))


def check_contents(image: Image) -> Facts:
    """Check size, what must not be there, and that nothing but the volume and /tmp can be written."""
    size = sum(parts(image.root).values())
    assert size < MOST_BYTES, size
    for name in ("torch", "monai", "pip", "setuptools"):
        done = image.run("python", "-c", f"import {name}", mounts={})
        assert "No module named" in done.stderr, (name, done.stderr)
    done = image.run("find", "/", "-xdev", "-writable", "!", "-type", "l", mounts={})
    found = [line for line in done.stdout.splitlines() if not line.startswith(("/proc", "/dev", "/tmp"))]
    assert found == [], found
    bill = json.loads((image.root / "usr/share/doc/dints-deploy/sbom.cdx.json").read_text())
    names = {one["name"] for one in bill["components"]}
    assert {"openvino", "onnxruntime", "python3", "libc6"} <= names
    yield "unpacked", f"{size / MEBIBYTE:.0f} MB"
    yield "bill of materials", f"{len(names)} packages"
    yield "not in the image", "torch, MONAI, pip, setuptools; nothing that its user could write"


def try_scan(image: Image, folder: Path) -> Facts:
    """Segment a real scan in a namespace without routes, with each engine."""
    out = _owned(folder / "out")
    mounts = {SCAN.parent: "/mnt/in", out: "/mnt/out"}
    for engine in ("openvino", "onnx"):
        begin = time.monotonic()
        words = ("dints-deploy", "segment", f"/mnt/in/{SCAN.name}", "-o", "/mnt/out", "--engine", engine, "--json")
        done = image.run(*words, "--to", "nifti,preview,html", mounts=mounts, network=False)
        assert done.returncode == 0, done.stderr
        (case,) = json.loads(done.stdout)["cases"]
        volumes = {s["id"]: s["volume_ml"] for s in case["structures"]}
        assert 1.0 < volumes["hippocampus-anterior"] < 2.6, volumes
        said = ", ".join(f"{name} {volume:.2f} mL" for name, volume in volumes.items())
        yield f"a real scan with {engine}, without a route to anywhere", f"{time.monotonic() - begin:.1f} s: {said}"


def try_daemon(image: Image, folder: Path) -> Facts:
    """Run the daemon; send it a study, find the result in Orthanc; hang its worker; stop it."""
    port, http_port = free_port(), free_port()
    settings = json.loads((HERE / "orthanc.json").read_text())
    own = {"HttpPort", "DicomPort", "StorageDirectory", "DicomModalities", "AuthenticationEnabled"}
    options = {key: value for key, value in settings.items() if key not in own}
    with orthanc(folder / "orthanc", modalities={"DINTS": ("127.0.0.1", port)}, **options) as pacs:
        etc, data = folder / "etc", _owned(folder / "data")
        etc.mkdir()
        (etc / "appliance.toml").write_text(configured(pacs, port, http_port))
        (etc / "appliance.toml").chmod(0o444)
        mounts = {etc: "/etc/dints-deploy", data: "/var/lib/dints-deploy"}
        words = (*image.config["Entrypoint"], *image.config["Cmd"])
        begin = time.monotonic()
        with container(image, *words, mounts=mounts) as process:
            wait_until(lambda: ready(http_port), seconds=60, what="the daemon")
            seconds, computed = time.monotonic() - begin, cpu_seconds(_children(process.pid)[0])
            yield "the daemon is ready after", f"{seconds:.1f} s, {computed:.1f} s of them computing"
            crowded = os.getloadavg()[0] > len(os.sched_getaffinity(0))
            assert (computed if crowded else seconds) < READY_SECONDS
            assert healthy(image, mounts)
            yield from round_trip(folder / "first", pacs, port)
            yield from hang(image, mounts, process, folder / "second", port)
            wait_until(lambda: len(pacs.instances()) == 2 * RESULTS, seconds=120, what="the second result")
            yield "the study of the hung worker", "its result is in Orthanc as well"
            begin = time.monotonic()
            os.kill(_children(process.pid)[0], 15)
            status = process.wait(60)
            yield "after SIGTERM", f"exit status {status} in {time.monotonic() - begin:.1f} s"
            assert status == 0


def configured(pacs: Orthanc, port: int, http_port: int) -> str:
    """Return the shipped appliance.toml with the ports of this run."""
    fields = tomllib.loads((HERE / "appliance.toml").read_text())
    fields["listeners"][0] |= {"address": "127.0.0.1", "port": port}
    fields["destinations"][0] |= {"host": "127.0.0.1", "port": pacs.dicom_port}
    fields["disk"] = {"free_bytes": 1 << 30}
    fields["http"] = {"port": http_port}
    return tomli_w.dumps(fields)


def round_trip(folder: Path, pacs: Orthanc, port: int) -> Facts:
    """Send a study by storescu and wait for its three results."""
    write_study(SCAN, folder, seed=1)
    begin = time.monotonic()
    command = ["storescu", "-aet", "MR1", "-aec", "DINTS", "+sd", "127.0.0.1", str(port), str(folder)]
    subprocess.run(command, check=True)
    wait_until(lambda: len(pacs.instances()) == RESULTS, seconds=120, what="the result in Orthanc")
    kinds = sorted(pacs.get(f"instances/{one['ID']}/simplified-tags")["Modality"] for one in pacs.instances().values())
    yield "a study by storescu", f"{', '.join(kinds)} in Orthanc {time.monotonic() - begin:.1f} s after storescu began"


def hang(image: Image, mounts: Mapping[Path, str], process: subprocess.Popen[str], study: Path, port: int) -> Facts:
    """Stop the worker process, send a study, and see health turn bad and good again."""
    (daemon,) = _children(process.pid)
    (worker,) = _children(daemon)
    os.kill(worker, 19)
    write_study(SCAN, study, seed=2)
    send(Remote("127.0.0.1", port, "DINTS", "MR1"), sorted(study.iterdir()))
    begin = time.monotonic()
    wait_until(lambda: not healthy(image, mounts), seconds=90, what="the health check to turn bad")
    bad = time.monotonic() - begin
    wait_until(lambda: healthy(image, mounts), seconds=120, what="the health check to turn good")
    good = time.monotonic() - begin
    yield "a worker that hangs", f"unhealthy {bad:.0f} s after its study was sent, healthy again after {good:.0f} s"


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process took: what its start costs on a machine that others keep busy."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ready(http_port: int) -> bool:
    """Ask the daemon itself."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def healthy(image: Image, mounts: Mapping[Path, str]) -> bool:
    """Run the image's health check."""
    return image.run(*image.config["Healthcheck"]["Test"][1:], mounts=mounts).returncode == 0


@contextmanager
def container(image: Image, *words: str, mounts: Mapping[Path, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a command of the image until the end of the block."""
    with subprocess.Popen(image.command(*words, mounts=mounts), text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def try_search(image: Image) -> Facts:
    """Import what the workshop needs, and check the data of a task."""
    yield "unpacked", f"{sum(parts(image.root).values()) / MEBIBYTE:.0f} MB"
    code = "import torch, monai, dints_search; print(torch.__version__, monai.__version__)"
    done = image.run("python", "-c", code, mounts={})
    assert done.returncode == 0, done.stderr
    yield "torch, MONAI", ", ".join(done.stdout.split())
    task = {SCAN.parents[1]: "/mnt/in"}
    done = image.run("dints-deploy", "data", "check", "/mnt/in", mounts=task, network=False)
    assert done.returncode == 0, done.stderr
    yield "dints-deploy data check", done.stdout.strip().splitlines()[-1]


def _owned(folder: Path) -> Path:
    """Make a folder of the image's user."""
    folder.mkdir(mode=0o700)
    os.chown(folder, 10001, 10001)
    return folder


def _children(pid: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


if __name__ == "__main__":
    main()
