"""What the documents say: commands run as they stand, quoted answers are the answers, links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

from tests.nifti_files import nifti
from tests.peers import wait_until
from tests.phantoms import affine

ROOT = Path(__file__).parents[2]
TASK = ROOT / "tests" / "data" / "Task04_Hippocampus"
SCAN = TASK / "imagesTr" / "hippocampus_038.nii.gz"
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md")),
             *sorted((ROOT / "zoo").glob("*/card.md"))]  # fmt: skip

NOT_RUN = {
    "make test": "this is it",
    "make demo": "installs an environment; its script is run by test_shipped_entry.py",
    "make bundle": "run by test_bare_install.py",
    "tar xf dints-deploy-*.tar": "run by test_bare_install.py",
    "dints-deploy-*/install.sh *": "run by test_bare_install.py",
    "pip install *": "installs",
    "python3 -m venv *": "installs",
    "/opt/dints-deploy/bin/*": "installed there",
    "docker *": "needs a Docker engine; docker/build.sh builds and tries the same files",
    "docker/secrets.sh": "writes into the checkout; run by test_docker.py",
    "storescu *": "sends to the containers; docker/build.sh does it",
    "useradd *": "changes the machine",
    "install *": "changes the machine",
    "systemctl *": "changes the machine",
    "dints-deploy data fetch *": "needs the network",
    "dints-deploy data plan *": "made and used by test_ten_recipes.py",
    "dints-deploy search *": "takes hours; run small by test_search_command.py",
    "dints-deploy retrain *": "takes hours; run small by test_publish.py",
    "torchrun *": "takes hours; run small by test_search_command.py",
    "dints-deploy crossval *": "takes hours; run small by test_crossval.py",
    "dints-deploy publish *": "needs a run; run small by test_publish.py",
    "dints-deploy evaluate --run *": "needs a run; run small by test_publish.py",
    "dints-deploy evaluate --model my-entry *": "needs that entry; run small by test_crossval.py",
    "dints-deploy segment scan.nii.gz --model my-*": "needs that entry; test_catalog.py adds and runs one",
    "dints-deploy zoo add my-*": "needs that entry; test_catalog.py adds and runs one",
    "dints-deploy export *": "takes minutes; run small by test_export.py",
    "dints-deploy segment scan.nii.gz --precision int8": "needs that export; run small by test_export.py",
    "dints-deploy jobs [rqps]*": "names a job; run by test_daemon.py",
}
"""Commands that are only parsed (tests/unit/test_docs.py), and why."""


def blocks(path: Path, kind: str) -> list[str]:
    """Return the fenced blocks of a kind; those of commands have none."""
    found: list[str] = []
    opened = ""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("```") and not opened:
            opened = line.strip()
            found += [""] if opened == f"```{kind}" else []
        elif line.startswith("```"):
            opened = ""
        elif opened == f"```{kind}":
            found[-1] += line
    return found


def commands() -> Iterator[tuple[str, str]]:
    """Yield document and command, in reading order, each command once."""
    seen = set()
    for path in DOCUMENTS:
        for block in blocks(path, ""):
            if block.startswith("$ "):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                command = " ".join(re.sub(r"\s+#.*", "", line).split())
                if command and command not in seen:
                    seen.add(command)
                    yield path.name, command


def why_not(command: str) -> str:
    """Return why a command is not run; empty where it is."""
    return next((why for pattern, why in NOT_RUN.items() if fnmatch(command, pattern)), "")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the documents speak of."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copy(SCAN, folder / "scan.nii.gz")
    head = np.random.default_rng(0).integers(0, 900, (176, 40, 40)).astype(np.int16)
    (folder / "head.nii").write_bytes(nifti(head, sform=affine(spacing=(1, 1, 1))))
    subprocess.run(["gzip", folder / "head.nii"], check=True)
    (folder / "MyTask").symlink_to(TASK)
    for name in ("zoo", "tests"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment(place: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "HOME": str(place), "DINTS_STATE": str(place / "state"), "PYTHONPATH": str(ROOT)}


def run(place: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_commands_of_the_documents_run_as_they_stand(place: Path) -> None:
    ran = 0
    for document, command in commands():
        if why_not(command):
            continue
        ran += 1
        if command.startswith("dints-deploy watch"):
            status, said = start_and_stop(place, command)
        else:
            done = run(place, command)
            status, said = done.returncode, done.stdout + done.stderr
        assert status == 0, f"{document}: {command}\n{said}"
    assert ran > 15


def start_and_stop(place: Path, command: str) -> tuple[int, str]:
    """Run the daemon until it says that it is ready, then end it."""
    log = place / "daemon.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=place, env=environment(place), stdout=file, stderr=file
        )
    try:
        wait_until(lambda: '"ready"' in log.read_text() or process.poll() is not None, seconds=60, what=command)
    finally:
        process.send_signal(signal.SIGTERM)
    return process.wait(60), log.read_text()


def test_every_reason_for_not_running_still_has_its_command() -> None:
    everything = [command for _, command in commands()]
    assert [pattern for pattern in NOT_RUN if not any(fnmatch(command, pattern) for command in everything)] == []


def test_targets_and_files_of_commands_that_are_not_run_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document, command in commands():
        if target := re.match(r"make (\S+)", command):
            assert target[1] in targets, document
        for file in re.findall(r"\b(?:docker|docs)/[\w./-]+", command):
            assert (ROOT / file).exists(), f"{document}: {file}"


def test_quoted_answers_are_the_answers(place: Path) -> None:
    quoted = [block for path in DOCUMENTS for block in blocks(path, "") if block.startswith("$ ")]
    assert quoted
    for block in quoted:
        command, _, answer = block.removeprefix("$ ").partition("\n")
        done = run(place, command)
        assert (done.stdout + done.stderr).split() == answer.split()


def test_python_of_the_readme_runs_and_gives_what_its_comment_says(place: Path) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    done = run(place, f"python - <<'END'\n{code}\nprint(result.volumes_ml)\nEND")
    assert done.returncode == 0, done.stderr
    expected = re.findall(r"'([\w-]+)': ([0-9.]+)", code)
    found = dict(re.findall(r"'([\w-]+)': ([0-9.]+)", done.stdout))
    assert expected
    assert {name: float(found[name]) for name, _ in expected} == pytest.approx(
        {name: float(value) for name, value in expected}, abs=0.02
    )


def slug(heading: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target
