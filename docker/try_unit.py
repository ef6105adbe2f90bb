"""Try the systemd unit, by the commands of docs/install.md, under a systemd of its own in a container.

python -m docker.try_unit [--record]

It needs a Docker engine, DCMTK and the image dints-deploy:latest, to which it adds Debian's systemd from the network.
A study is sent and its result found in the folder of results; the unit is reloaded; its main process is
stopped in its tracks, and systemd's watchdog starts it anew.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.machine import write
from docker.try_compose import STUDIES, call, waited

ROOT = Path(__file__).parents[1]
NAME = "dints-deploy-try-unit"
FOLDER = "/var/lib/dints-deploy"
WATCHDOG_SECONDS = 90.0

DOCKERFILE = """
FROM dints-deploy:latest
USER root
ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin
RUN apt-get update && apt-get install -y --no-install-recommends systemd dbus && rm -rf /var/lib/apt/lists/*
RUN userdel dints-deploy && rm -rf /etc/dints-deploy
"""
"""The image lends its Debian and its /opt/dints-deploy; the user is made anew by the commands of the documents."""

RIGHTS = ("SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE", "DAC_READ_SEARCH", "SYS_NICE", "SYSLOG")
"""What systemd itself needs to make the sandbox of a unit; the unit's processes get none."""


def main() -> None:
    """Try the unit; end with an AssertionError where something is not as it should be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/image_unit.json")
    recorded = parser.parse_args().record
    found = {}
    with machine() as address:
        for name, text in tried(address):
            print(f"{name}: {text}", flush=True)
            found[name] = text
    if recorded:
        about = {"title": "The unit of systemd", "page": "images", "command": "python -m docker.try_unit"}
        print(write("image_unit", {**about, "facts": found}))


def tried(address: str) -> Iterator[tuple[str, str]]:
    """Yield what was found: a few words, and the figure."""
    yield "systemd", inside("systemctl --version").split()[1]
    begin = time.monotonic()
    for command in commands():
        inside(f"cd /srv && {command}")
    yield "installed and started", f"by the commands of install.md, ready after {time.monotonic() - begin:.1f} s"
    status = inside("cat /proc/$(systemctl show -P MainPID dints-deploy)/status")
    rights = dict(re.findall(r"^(CapEff|CapBnd|NoNewPrivs|Seccomp):\s+(\w+)$", status, re.MULTILINE))
    assert rights == {"CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}, rights
    yield "its process", "no capability, no new privileges, a filter of system calls"
    call("storescu", "-aet", "MR1", "-aec", "DINTS", "+sd", "+r", address, "11112", str(STUDIES / "study-1"))
    seconds = waited(lambda: results() == ["result.seg.dcm", "result.sr.dcm"])
    yield "a study by storescu", f"SEG and SR in the folder of results {seconds:.0f} s later"
    inside("systemctl reload dints-deploy")
    assert inside("systemctl is-active dints-deploy").strip() == "active"
    yield "reload", "the daemon goes on"
    inside("kill -STOP $(systemctl show -P MainPID dints-deploy)")
    seconds = waited(lambda: restarts() == 1 and "activ" in inside("systemctl show -P ActiveState dints-deploy"))
    assert seconds < WATCHDOG_SECONDS, seconds
    yield "a main process that hangs", f"the watchdog started it anew {seconds:.0f} s later"
    begin = time.monotonic()
    waited(lambda: inside("systemctl show -P ActiveState dints-deploy").strip() == "active")
    inside("systemctl stop dints-deploy")
    assert inside("systemctl show -P Result dints-deploy").strip() == "success"
    yield "stop", f"a clean end within {time.monotonic() - begin:.0f} s of the new start"


def commands() -> list[str]:
    """Return the commands of the documents that install the service, and the one that makes a configuration."""
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## A service of systemd\n\n```\n(.*?)```", text, re.DOTALL)
    init = (
        f"/opt/dints-deploy/bin/dints-deploy init -o appliance.toml --caller MR1 --pacs none --data-dir {FOLDER}/data"
    )
    return [init, *block.splitlines()]


def results() -> list[str]:
    """Return the files of results."""
    return inside(f"ls {FOLDER}/data-results/*/ 2>/dev/null || true").split()


def restarts() -> int:
    """Return how often systemd started the daemon anew."""
    return int(inside("systemctl show -P NRestarts dints-deploy"))


def inside(command: str) -> str:
    """Run a shell command on the machine that the container stands for."""
    return call("docker", "exec", "--env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", NAME, "sh", "-c", command)


@contextmanager
def machine() -> Iterator[str]:
    """Run a Debian with systemd until the end of the block; yield its address."""
    build = ["docker", "build", "--quiet", "--network", "host", "--tag", NAME, "-"]
    built = subprocess.run(build, input=DOCKERFILE, text=True, check=False, capture_output=True)
    assert built.returncode == 0, built.stderr
    rights = [word for right in RIGHTS for word in ("--cap-add", right)]
    open_ = ["--security-opt", "seccomp=unconfined", "--security-opt", "systempaths=unconfined"]
    places = ["--tmpfs", "/run", "--tmpfs", "/run/lock", "--tmpfs", "/tmp", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup"]
    system = ["--user", "root", "--entrypoint", "/lib/systemd/systemd", NAME]
    call("docker", "run", "--detach", "--name", NAME, *rights, *open_, *places, *system)
    try:
        waited(lambda: inside("systemctl is-system-running || true").strip() == "running")
        inside("mkdir -p /srv/docs/systemd")
        unit = ROOT / "docs" / "systemd" / "dints-deploy.service"
        call("docker", "cp", str(unit), f"{NAME}:/srv/docs/systemd/")
        yield call("docker", "inspect", "--format", "{{.NetworkSettings.IPAddress}}", NAME).strip()
    finally:
        call("docker", "rm", "--force", NAME)


if __name__ == "__main__":
    main()
