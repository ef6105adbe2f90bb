"""What a person meets at the end of a search's rope: a wish that leads nowhere, Ctrl-C, a narrow terminal."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from dints_search.checkpoint import load_checkpoint
from dints_search.metrics import read_metrics
from dints_search.search_run import read_search_config
from tests.command import Machine, default_interrupt
from tests.tiny_task import tiny_search_recipe, write_task

BAR = """
from dints_deploy.cli.console import progress
with progress("search") as bar:
    for step in range(400, 420):
        bar(step, 900, "L_w 0.421 L_seg 0.518 L_alpha 0.322 L_eta 0.00676 L_tp 30.1 L_m 0.247 Me/Ma 0.747")
        import time; time.sleep(0.1)
"""

BAR_IN_A_LOG = """
import time
from dints_deploy.cli import console
with console.progress("search") as bar:
    time.sleep(10.1)
    for step in range(1, 530):
        bar(step, TOTAL)
        time.sleep(0.02)
"""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Return a folder with the tiny task and its recipe, which keeps no checkpoint before its end."""
    write_task(tmp_path / "task")
    recipe = tiny_search_recipe(tmp_path, checkpoint_every=10_000).model_dump(mode="json", exclude_none=True)
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
    return Machine(tmp_path)


def search(*words: object) -> list[str]:
    return ["search", "--task", "tiny.toml", "--data", "task", "--out", "run", "--threads", "1", *map(str, words)]


def test_a_wish_that_leads_to_no_network_leaves_the_search_and_its_report(machine: Machine) -> None:
    unmet = machine.run(*search("--steps", 4, "--max-latency", 1e-6))
    assert (unmet.code, unmet.err.count("\n")) == (1, 1), unmet.err
    assert "[genotype-invalid]" in unmet.err
    assert "The search is kept in run: repeat the command with --resume" in unmet.err
    run = machine.folder / "run"
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "None: expected a budget of at least" in report
    assert "| least of any network | 0." in report
    assert all((run / name).stat().st_size > 5000 for name in ("relaxation.png", "curves.png"))
    assert not (run / "genotype.json").exists()
    before = (run / "metrics.jsonl").read_bytes()
    assert machine.run(*search("--steps", 4, "--resume")).code == 0
    assert (run / "genotype.json").exists()
    assert (run / "metrics.jsonl").read_bytes() == before
    report = (run / "report.md").read_text(encoding="utf-8")
    assert ("None:" in report, "![the network found](architecture.png)" in report) == (False, True)


def test_an_unmet_wish_leaves_the_network_that_was_found_before_and_its_report(machine: Machine) -> None:
    assert machine.run(*search("--steps", 2)).code == 0
    kept = {name: (machine.folder / "run" / name).read_bytes() for name in ("genotype.json", "report.md")}
    assert machine.run(*search("--steps", 2, "--resume", "--max-latency", 1e-6)).code == 1
    assert {name: (machine.folder / "run" / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize("words", [("--window", "13,13,13"), ("--depths", 5), ("--depths", 5, "--max-gmac", 1)])
def test_a_window_that_does_not_fit_is_told_in_one_line(machine: Machine, words: tuple[object, ...]) -> None:
    said = machine.run(*search(*words, "--memory", "measured"))
    assert (said.code, said.err.count("\n"), "[recipe-invalid]" in said.err) == (1, 1, True), said.err


def test_a_budget_that_no_network_keeps_is_told_before_the_search(machine: Machine) -> None:
    said = machine.run(*search("--max-gmac", 1e-9))
    assert (said.code, "[genotype-invalid]" in said.err) == (1, True)
    assert not (machine.folder / "run").exists()


def test_a_sigma_below_every_network_is_remarked_on(machine: Machine) -> None:
    said = machine.run(*search("--steps", 2, "--sigma", 0.01, "--memory", "measured"))
    assert said.code == 0
    least = float(re.findall(r"no network takes less than ([0-9.]+) of", said.err)[0])
    assert 0.01 < least < 0.9
    assert f"| least of any network | {least:.3f} |" in (machine.folder / "run" / "report.md").read_text()


def test_ctrl_c_ends_after_a_step_with_a_checkpoint_and_tells_how_to_go_on(machine: Machine) -> None:
    first = interrupted_after(machine, 3)
    steps = interrupted_after(machine, len(first) + 3, "--resume")
    assert steps == list(range(1, len(steps) + 1))  # the second call went on where the first one stopped
    assert steps[: len(first)] == first


def interrupted_after(machine: Machine, steps: int, *words: str) -> list[float | str]:
    """Press Ctrl-C after so many steps and return those of the history."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dints_deploy", *search("--steps", 2000, *words)],
        cwd=machine.folder,
        env=machine.environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=default_interrupt,
    )
    history = machine.folder / "run" / "metrics.jsonl"
    while process.poll() is None and not (history.exists() and history.read_bytes().count(b"\n") >= steps):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the workers too
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    told = ["ending after this step; Ctrl-C again ends at once"]
    told += ["interrupted: the same command goes on from the last checkpoint with --resume"]
    assert said.splitlines() == told
    assert "Traceback" not in said
    run = machine.folder / "run"
    found = [line["step"] for line in read_metrics(run)]
    assert load_checkpoint(run / "checkpoint.pt", read_search_config(run).digest())["step"] == found[-1]
    return found


def test_a_log_tells_the_time_left_by_the_steps_alone_and_only_where_it_is_known() -> None:
    """Ten seconds pass before the first step, which say nothing of how long a step takes."""
    wanted = {
        "1000": r"search: 1 of 1000\nsearch: \d+ of 1000, 0:00:\d\d left\n",
        "0": r"search: 1 of 0\nsearch: \d+ of 0\n",
    }
    runs = {
        total: subprocess.Popen(
            [sys.executable, "-c", BAR_IN_A_LOG.replace("TOTAL", total)], stderr=subprocess.PIPE, text=True
        )
        for total in wanted
    }
    for total, run in runs.items():
        assert re.fullmatch(wanted[total], said := run.communicate()[1]), said


def test_a_terminal_of_80_columns_shows_the_bar_the_count_the_time_left_and_every_loss() -> None:
    shown = on_a_terminal([sys.executable, "-c", BAR], columns=80)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"search ━+.*4\d\d/900 0:0\d:\d\d", plain)
    assert all(word in plain.replace("\r", "").replace("\n", "") for word in ("L_w 0.421", "L_m 0.247", "Me/Ma 0.747"))


def on_a_terminal(command: list[str], columns: int) -> str:
    """Return what a command writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm"}
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    pieces = []
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(ours)
    assert process.wait() == 0
    return b"".join(pieces).decode()
