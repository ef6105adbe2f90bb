"""`dints-deploy init` asks a person on a terminal, and asks again what makes no sense."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from dints_deploy.config.load import load_config


def asked(folder: Path, typed: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command on a terminal at which a person types these lines."""
    leader, follower = pty.openpty()
    os.write(leader, "".join(f"{line}\n" for line in typed).encode())
    try:
        return subprocess.run(
            [sys.executable, "-m", "dints_deploy", "init", "-o", str(folder / "appliance.toml"), *words],
            stdin=follower, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    finally:
        os.close(leader)
        os.close(follower)


def test_a_person_is_asked_and_what_makes_no_sense_is_asked_again(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    typed = [
        data,
        "BRAIN",
        "a lot",
        "70000",
        "10104",
        "MR1, CT1",
        "",
        "10.1.2.3:104",
        "PACS@10.1.2.3:x",
        "PACS@10.1.2.3:104",
    ]
    done = asked(tmp_path, typed)
    assert done.returncode == 0, done.stderr
    again = [line for line in done.stderr.splitlines() if "error: " in line]
    assert [line.partition("found ")[2].partition(":")[0] for line in again] == ["a lot", "70000", "10.1.2.3", "x"]
    config = load_config(tmp_path / "appliance.toml")
    (listener,), (pacs,) = config.listeners, config.destinations
    assert str(config.data_dir) == data
    assert (listener.port, listener.titles[0].ae_title, listener.titles[0].callers) == (10104, "BRAIN", ("MR1", "CT1"))
    assert config.routes[0].entry == "hippocampus"
    assert pacs.kind == "dicom"
    assert (pacs.ae_title, pacs.host, pacs.port, pacs.calling_ae_title) == ("PACS", "10.1.2.3", 104, "BRAIN")


def test_what_an_option_says_is_not_asked(tmp_path: Path) -> None:
    words = [
        "--data-dir",
        str(tmp_path / "d"),
        "--ae-title",
        "A",
        "--port",
        "104",
        "--caller",
        "MR1",
        "--entry",
        "hippocampus",
    ]
    done = asked(tmp_path, [], *words, "--pacs", "none")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["--port", "0"], ["--port", "65536"], ["--pacs", "PACS"], ["--pacs", "P@h:no"]])
def test_an_option_that_makes_no_sense_is_one_sentence_and_writes_nothing(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dints_deploy", "init", "-o", str(tmp_path / "appliance.toml"), *words],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith(" [usage]\n")
    assert not list(tmp_path.iterdir())
