"""Try compose.yaml on a Docker engine: up, a study by storescu, its result in Orthanc's page, a hung worker, down.

python -m docker.try_compose [--record]

It needs an engine, compose (the plug-in, or the one that the tests have in their environment), DCMTK, ports 11112 and
8042, and the image dints-deploy:latest; Orthanc's image is the one of compose.yaml, or that of ORTHANC_IMAGE. The
project gets a name, a password and volumes of its own; all are removed in the end.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from tests.peers import wait_until

HERE = Path(__file__).parent
STUDIES = HERE.parent / "tests" / "data" / "scans" / "brain-studies"
PROJECT = "dints-deploy-try"
PAGE = "http://127.0.0.1:8042"
KINDS = ["OT", "SEG", "SR"]

HANG = "worker=$(cat /proc/1/task/*/children) && kill -STOP $worker"
"""The daemon is the first process of its container, and the worker its only child."""


@dataclass(frozen=True)
class Stack:
    """The two services.

    Attributes:
        compose: how compose is called.
        password: of Orthanc's page.
    """

    compose: tuple[str, ...]
    password: str

    def run(self, *words: str) -> str:
        """Run compose and return what it prints."""
        return call(*self.compose, *words)

    def container(self, service: str) -> str:
        """Return the identifier of a service's container."""
        return self.run("ps", "--all", "--quiet", service).strip()

    def health(self) -> str:
        """Return what the engine's health check says of the daemon."""
        return call("docker", "inspect", "--format", "{{.State.Health.Status}}", self.container("dints-deploy")).strip()

    def checks(self) -> list[bool]:
        """Return the last health checks, oldest first: True for a good one."""
        said = call("docker", "inspect", "--format", "{{json .State.Health.Log}}", self.container("dints-deploy"))
        return [one["ExitCode"] == 0 for one in json.loads(said)]

    def results(self) -> list[str]:
        """Return the kinds of the objects that Orthanc has, as its page's user; not too often, as it works too."""
        time.sleep(0.25)
        listed = page("/instances", f"orthanc:{self.password}")
        return sorted(
            page(f"/instances/{one}/simplified-tags", f"orthanc:{self.password}")["Modality"] for one in listed
        )


def main() -> None:
    """Try the services; end with an AssertionError where something is not as it should be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/image_compose.json")
    recorded = parser.parse_args().record
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in tried(Path(folder)):
            print(f"{name}: {text}", flush=True)
            found[name] = text
    if recorded:
        about = {"title": "The services of compose.yaml", "page": "images", "command": "python -m docker.try_compose"}
        print(write("image_compose", {**about, "facts": found}))


def tried(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what was found: a few words, and the figure."""
    compose = ("docker", "compose") if has_plugin() else (str(Path(sys.executable).parent / "docker-compose"),)
    engine = call("docker", "version", "--format", "{{.Server.Version}}").strip()
    yield "engine and compose", f"{engine}, {call(*compose, 'version', '--short').strip()}"
    with stack(folder, compose) as one:
        yield "up", f"both services run; healthy {waited(lambda: one.health() == 'healthy'):.0f} s later"
        refused = page_status("/instances")
        assert refused == 401, refused
        yield "Orthanc's page without the password", f"answers {refused}"
        seconds = sent(one, "study-1", times=1)
        yield "a study by storescu", f"{', '.join(KINDS)} in Orthanc's page {seconds:.0f} s later"
        ours = one.container("dints-deploy")
        call("docker", "exec", ours, "sh", "-c", HANG)
        seconds = sent(one, "study-3", times=2)
        assert False in one.checks()
        waited(lambda: one.health() == "healthy" and one.checks()[-1])
        yield (
            "a worker that hangs",
            f"a health check fails; the next ones are good; the result is there {seconds:.0f} s later",
        )
        begin = time.monotonic()
        one.run("stop")
        status = call("docker", "inspect", "--format", "{{.State.ExitCode}}", ours).strip()
        assert status == "0", status
        yield "stop", f"exit status {status} of the daemon, {time.monotonic() - begin:.0f} s"


def sent(one: Stack, study: str, *, times: int) -> float:
    """Send a study and return the seconds until Orthanc has the results of all that were sent."""
    begin = time.monotonic()
    call("storescu", "-aet", "ME", "-aec", "DINTS", "+sd", "+r", "localhost", "11112", str(STUDIES / study))
    waited(lambda: one.results() == sorted(KINDS * times))
    return time.monotonic() - begin


@contextmanager
def stack(folder: Path, compose: tuple[str, ...]) -> Iterator[Stack]:
    """Run copies of the files with secrets of their own until the end of the block; then remove all that they made."""
    shutil.copytree(HERE, folder / "docker", ignore=shutil.ignore_patterns("secrets", "__pycache__"))
    call("sh", str(folder / "docker" / "secrets.sh"))
    users = json.loads((folder / "docker" / "secrets" / "orthanc-users.json").read_text())["RegisteredUsers"]
    words = (*compose, "--project-name", PROJECT, "--file", str(folder / "docker" / "compose.yaml"))
    one = Stack(words, users["orthanc"])
    try:
        one.run("up", "--detach", "--no-build")
        yield one
    finally:
        one.run("down", "--volumes")


def has_plugin() -> bool:
    """Say whether compose is a plug-in of docker."""
    return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0


def call(*words: str) -> str:
    """Run a command of this machine and return what it prints."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def waited(true: Callable[[], bool]) -> float:
    """Wait for a condition and return the seconds it took."""
    begin = time.monotonic()
    wait_until(true, seconds=180)
    return time.monotonic() - begin


def page(path: str, user: str) -> Any:
    """Return a document of Orthanc's page."""
    request = urllib.request.Request(f"{PAGE}{path}")
    request.add_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def page_status(path: str) -> int:
    """Return the status that a stranger gets."""
    try:
        with urllib.request.urlopen(f"{PAGE}{path}", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


if __name__ == "__main__":
    main()
