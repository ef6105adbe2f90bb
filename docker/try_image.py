"""Try a built image: its labels, a real scan without a network, the daemon and an Orthanc (run by build.sh, as root).

buildah inspect --type image NAME | python -m docker.try_image runtime MOUNTED_ROOT

A container is made here of namespaces: a root that cannot be written, the image's own user, no new privileges.
"""

from __future__ import annotations

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

from dints_deploy.dicom.network import Remote, send
from tests.peers import Orthanc, free_port, orthanc, wait_until
from tests.real_study import write_study

HERE = Path(__file__).parent
SCAN = HERE.parent / "tests" / "data" / "Task04_Hippocampus" / "imagesTr" / "hippocampus_038.nii.gz"
MEBIBYTES = 900
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


def main() -> None:
    """Try the image that is named; end with an AssertionError where it is not what it should be."""
    kind, root = sys.argv[1], Path(sys.argv[2])
    image = Image(root, json.load(sys.stdin)["Docker"]["config"])
    check_labels(image)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        if kind == "search":
            try_search(image, Path(folder))
            return
        check_contents(image, Path(folder))
        try_scan(image, Path(folder))
        try_daemon(image, Path(folder))


def check_labels(image: Image) -> None:
    """Check what the image says of itself."""
    labels = {key.rpartition(".")[2]: value for key, value in image.config["Labels"].items()}
    assert {"title", "description", "licenses", "version", "revision", "created"} <= labels.keys(), labels
    assert "unknown" not in labels.values(), labels
    assert image.config["User"] == "10001:10001"
    say("labels", ", ".join(f"{key} {labels[key]}" for key in ("title", "version", "revision")))


def check_contents(image: Image, folder: Path) -> None:
    """Check size, what must not be there, and that nothing but the volume and /tmp can be written."""
    size = sum(path.lstat().st_size for path in image.root.rglob("*") if not path.is_symlink() and path.is_file())
    assert size < MEBIBYTES << 20, size
    for name in ("torch", "monai", "pip", "setuptools"):
        done = image.run("python", "-c", f"import {name}", mounts={})
        assert "No module named" in done.stderr, (name, done.stderr)
    done = image.run("find", "/", "-xdev", "-writable", "!", "-type", "l", mounts={})
    found = [line for line in done.stdout.splitlines() if not line.startswith(("/proc", "/dev", "/tmp"))]
    assert found == [], found
    bill = json.loads((image.root / "usr/share/doc/dints-deploy/sbom.cdx.json").read_text())
    names = {one["name"] for one in bill["components"]}
    assert {"openvino", "onnxruntime", "python3", "libc6"} <= names or "tensorrt" in names
    say(
        "contents",
        f"{size / 2**20:.0f} MB, {len(names)} packages in the bill of materials, no torch, no pip, read-only",
    )


def try_scan(image: Image, folder: Path) -> None:
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
        say("segment", f"{time.monotonic() - begin:.1f} s with {engine}, no route to anywhere: {said}")


def try_daemon(image: Image, folder: Path) -> None:
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
        with container(image, *words, mounts=mounts) as process:
            begin = time.monotonic()
            wait_until(lambda: ready(http_port), seconds=60, what="the daemon")
            seconds, computed = time.monotonic() - begin, cpu_seconds(_children(process.pid)[0])
            say("daemon", f"ready {seconds:.1f} s after the start, {computed:.1f} s of them computing")
            crowded = os.getloadavg()[0] > len(os.sched_getaffinity(0))
            assert (computed if crowded else seconds) < READY_SECONDS
            assert healthy(image, mounts)
            round_trip(folder / "first", pacs, port)
            hang(image, mounts, process, folder / "second", port)
            wait_until(lambda: len(pacs.instances()) == 2 * RESULTS, seconds=120, what="the second result")
            say("daemon", "the study of the hung worker is in Orthanc as well")
            begin = time.monotonic()
            os.kill(_children(process.pid)[0], 15)
            status = process.wait(60)
            say("daemon", f"exit status {status} {time.monotonic() - begin:.1f} s after SIGTERM")
            assert status == 0


def configured(pacs: Orthanc, port: int, http_port: int) -> str:
    """Return the shipped appliance.toml with the ports of this run."""
    fields = tomllib.loads((HERE / "appliance.toml").read_text())
    fields["listeners"][0] |= {"address": "127.0.0.1", "port": port}
    fields["destinations"][0] |= {"host": "127.0.0.1", "port": pacs.dicom_port}
    fields["disk"] = {"free_bytes": 1 << 30}
    fields["http"] = {"port": http_port}
    return tomli_w.dumps(fields)


def round_trip(folder: Path, pacs: Orthanc, port: int) -> None:
    """Send a study by storescu and wait for its three results."""
    write_study(SCAN, folder, seed=1)
    begin = time.monotonic()
    command = ["storescu", "-aet", "MR1", "-aec", "DINTS", "+sd", "127.0.0.1", str(port), str(folder)]
    subprocess.run(command, check=True)
    wait_until(lambda: len(pacs.instances()) == RESULTS, seconds=120, what="the result in Orthanc")
    kinds = sorted(pacs.get(f"instances/{one['ID']}/simplified-tags")["Modality"] for one in pacs.instances().values())
    say("daemon", f"{', '.join(kinds)} in Orthanc {time.monotonic() - begin:.1f} s after the study was sent")


def hang(image: Image, mounts: Mapping[Path, str], process: subprocess.Popen[str], study: Path, port: int) -> None:
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
    say("daemon", f"hung worker: unhealthy after {bad:.0f} s, healthy again after {time.monotonic() - begin:.0f} s")


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


def try_search(image: Image, folder: Path) -> None:
    """Import what the workshop needs, and describe the shipped genotype."""
    code = "import torch, monai, dints_search; print(torch.__version__, monai.__version__)"
    done = image.run("python", "-c", code, mounts={})
    assert done.returncode == 0, done.stderr
    say("search", f"torch, MONAI {done.stdout.strip()}")
    task = {SCAN.parents[1]: "/mnt/in"}
    done = image.run("dints-deploy", "data", "check", "/mnt/in", mounts=task, network=False)
    assert done.returncode == 0, done.stderr
    say("search", f"data check: {done.stdout.strip().splitlines()[-1]}")


def say(subject: str, text: str) -> None:
    """Print a line."""
    print(f"          {subject:<9} {text}", flush=True)


def _owned(folder: Path) -> Path:
    """Make a folder of the image's user."""
    folder.mkdir(mode=0o700)
    os.chown(folder, 10001, 10001)
    return folder


def _children(pid: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


if __name__ == "__main__":
    main()
