"""The command line is a contract: help with an example, --json, exit codes, and one reason code for each refusal."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer.main

import dints_deploy
from dints_deploy.cli.cases import plan_cases
from dints_deploy.cli.main import app
from dints_deploy.cli.segment import exit_code, parse_bytes
from dints_deploy.errors import (
    REASONS,
    DatasetError,
    DeliveryError,
    DintsError,
    EngineError,
    EntryError,
    IntakeRefused,
    OutputError,
    ScanRefused,
    ServiceError,
    UsageError,
    WorkerError,
)
from tests.tiny_entry import entry_fields, random_network, run_cli, write_entry

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("dints_deploy/**/*.py"), *ROOT.glob("search/dints_search/**/*.py")])

ERRORS: list[type[DintsError]] = [
    UsageError,
    ScanRefused,
    EntryError,
    EngineError,
    OutputError,
    ServiceError,
    WorkerError,
    IntakeRefused,
    DeliveryError,
    DatasetError,
]


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words and the object of every command that does something."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from commands(inner, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_the_commands_of_the_design_are_there() -> None:
    nouns = {"segment", "evaluate", "retrain", "publish", "export"}
    assert nouns <= {path[0] for path in COMMANDS}
    assert {path[1] for path in COMMANDS if path[0] == "zoo"} == {"list", "show", "verify", "add", "remove"}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_of_itself_and_json(path: tuple[str, ...]) -> None:
    said = run_cli(*path, "--help")
    assert said.code == 0
    assert f"Example: dints-deploy {' '.join(path)} " in " ".join(said.out.replace("│", " ").split()) + " "
    assert "--json" in said.out
    options = {option for parameter in COMMANDS[path].params for option in parameter.opts}
    words = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", COMMANDS[path].help.split("Example:")[1]))
    assert words <= options  # the example can be typed as it stands


def test_a_group_lists_what_it_holds() -> None:
    for words in ((), ("zoo",)):
        said = run_cli(*words, "--help")
        assert said.code == 0
        for path in COMMANDS:
            if path[: len(words)] == words:
                assert path[len(words)] in said.out


def test_the_version_is_that_of_the_changelog() -> None:
    top = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert top is not None
    assert run_cli("--version").out.strip() == top[1]


def test_what_the_command_line_does_not_know_is_a_wrong_call() -> None:
    for words in (["nonsense"], ["segment", "--nonsense"], ["zoo", "show"], ["segment", "x.nii", "--threads", "0"]):
        assert run_cli(*words).code == 2


def test_an_error_is_one_sentence_with_its_code_and_one_document_with_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINTS_ZOO", str(tmp_path / "zoo"))
    monkeypatch.setenv("DINTS_STATE", str(tmp_path / "state"))
    write_entry(tmp_path / "zoo" / "tiny", entry_fields(), [random_network(0).onnx()])
    for words in (["zoo", "show", "unknown"], ["evaluate", "--model", "unknown", "--data", "."]):
        said = run_cli(*words, "--json")
        assert said.code == 2
        assert said.err.count("\n") == 1
        assert said.err.endswith("[entry-unknown]\n")
        error = json.loads(said.out)["error"]
        assert error["code"] == "entry-unknown"
        assert error["message"] in said.err
        assert "tiny" in error["message"]  # what there is
        assert run_cli(*words).out == ""


SAYS_NO = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "monai"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
from dints_deploy.cli.main import main
main()
"""

WORKSHOP = {
    "retrain": ["retrain", "--genotype", "g.json", "--task", "4", "--data", ".", "--out", "run"],
    "publish": ["publish", "--run", "run", "--name", "x", "--data", "."],
    "export --run": ["export", "--run", "run", "--data", ".", "--onnx"],
    "evaluate --run": ["evaluate", "--run", "run", "--data", "."],
}


@pytest.mark.parametrize("command", WORKSHOP)
def test_a_workshop_command_without_torch_says_what_to_install(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SAYS_NO, *WORKSHOP[command], "--json"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "extra-missing"
    assert command in error["message"]
    assert "pip install 'dints-deploy[search]'" in error["message"]
    assert "is not installed here" in error["message"]
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0), ("512", 512), ("512B", 512), ("1K", 1024), ("1kB", 1024), ("1KiB", 1024), ("1Ki", 1024),
        ("512M", 512 << 20), ("4G", 4 << 30), ("4g", 4 << 30), ("1.5GiB", 3 << 29), ("2T", 2 << 40), (None, None),
    ],
)  # fmt: skip
def test_a_size_of_memory_is_read_in_powers_of_1024(text: str | None, expected: int | None) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "G", "4X", "-4G", "4 G", "4GG", "four", "1e9", "nan", "inf", "4,5G", ".5G", "4I", "4IB", "4BB", "٤G"]
)
def test_what_is_no_size_is_a_wrong_call(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert repr(text) in caught.value.message


def test_outputs_lie_where_the_call_says() -> None:
    here = [case.stem for case in plan_cases([Path("a/x.nii.gz"), Path("b/y.NII")], [], None)]
    assert here == [Path("x_seg"), Path("y_seg")]
    there = [case.stem for case in plan_cases([Path("a/x.nii.gz"), Path("b/y.nii")], [], Path("out"))]
    assert there == [Path("out/x_seg"), Path("out/y_seg")]
    [named] = plan_cases([Path("a/x.nii.gz")], [], Path("out/mask.nii.gz"))
    assert (named.stem, named.labels_path) == (Path("out/mask"), Path("out/mask.nii.gz"))
    [channels] = plan_cases([], ["T1=a/one.nii", "T2=b/two.nii"], None)
    assert channels.channels == {"T1": Path("a/one.nii"), "T2": Path("b/two.nii")}
    assert channels.stem == Path("one_seg")


WRONG_CALLS: dict[str, tuple[list[str], list[str], str | None]] = {
    "nothing": ([], [], None),
    "scans and channels": (["x.nii"], ["T1=y.nii"], None),
    "one scan twice": (["x.nii", "x.nii"], [], None),
    "two folders, one name": (["a/x.nii.gz", "b/x.nii.gz"], [], "out"),
    "two suffixes, one name": (["x.nii", "x.nii.gz"], [], None),
    "two scans into one file": (["x.nii", "y.nii"], [], "out.nii.gz"),
    "a channel without a file": ([], ["T1="], None),
    "a channel without a name": ([], ["=x.nii"], None),
    "a channel without =": ([], ["x.nii"], None),
    "one channel twice": ([], ["T1=x.nii", "T1=y.nii"], None),
    "over the scan itself": (["x.nii"], [], "x.nii"),
    "labels into a picture": (["x.nii"], [], "x.png"),
    "labels into another format": (["x.nii"], [], "out/x.MHA"),
}


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_call_that_makes_no_sense_is_refused_before_anything_is_read(call: str) -> None:
    scans, channels, output = WRONG_CALLS[call]
    with pytest.raises(UsageError) as caught:
        plan_cases([Path(scan) for scan in scans], channels, Path(output) if output else None)
    assert caught.value.code == "usage"


def test_a_batch_ends_with_its_worst_and_one_scan_with_its_own() -> None:
    refused, failed, wrong = ScanRefused("scan-empty", ""), EngineError("engine-failed", ""), UsageError("usage", "")
    cases: list[tuple[list[DintsError | None], int]] = [
        ([], 0), ([None], 0), ([None, None], 0), ([refused], 3), ([failed], 1), ([wrong], 2),
        ([None, refused], 3), ([refused, failed], 1), ([failed, None, refused], 1), ([None, wrong], 1),
    ]  # fmt: skip
    for errors, expected in cases:
        assert exit_code(errors) == expected


def test_each_error_has_the_exit_code_that_the_tree_draws() -> None:
    drawn = dict(re.findall(r"── (\w+) .*exit code (\d)", sys.modules["dints_deploy.errors"].__doc__ or ""))
    assert drawn == {error.__name__: str(error.exit_code) for error in ERRORS}
    assert set(ERRORS) == set(DintsError.__subclasses__())


def test_an_unknown_reason_cannot_be_given() -> None:
    with pytest.raises(KeyError, match="no-such-reason"):
        DintsError("no-such-reason", "x")
    assert str(ScanRefused("scan-empty", "expected bytes, found none")) == "expected bytes, found none [scan-empty]"


def raised_codes(tree: ast.AST) -> Iterator[str]:
    """Yield the codes that are written out where an error is made."""
    names = {error.__name__ for error in ERRORS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def test_every_reason_that_is_given_is_listed_and_every_listed_one_is_given() -> None:
    given: set[str] = set()
    texts: set[str] = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        given |= set(raised_codes(tree))
        if path.name != "errors.py":
            texts |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert len(given) > 30
    assert given - set(REASONS) == set()
    assert set(REASONS) - texts == set()


def test_every_reason_is_a_slug_with_a_meaning() -> None:
    for code, meaning in REASONS.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)
        assert meaning[0].islower()
        assert not meaning.endswith(".")


def test_what_the_package_offers_is_exactly_what_it_says() -> None:
    assert dir(dints_deploy) == sorted(set(dints_deploy.__all__)) == sorted(dints_deploy.HOMES)
    for name, home in dints_deploy.HOMES.items():
        assert getattr(dints_deploy, name) is getattr(import_module(f"dints_deploy.{home}"), name)
    with pytest.raises(AttributeError, match="no attribute 'segments'"):
        dints_deploy.segments  # noqa: B018
