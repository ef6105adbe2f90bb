"""Every command in the documents can be typed as it stands: it exists, and so do its options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from dints_deploy.cli.main import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "zoo").glob("*/card.md"))]


def typed(text: str) -> list[list[str]]:
    """Return the words of every line that starts with the program's name; a line that ends with a backslash goes on."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split("#")[0].split() for line in lines if line.strip().startswith("dints-deploy ")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_document_exists_with_its_options(path: Path) -> None:
    for words in typed(path.read_text(encoding="utf-8")):
        command, rest = typer.main.get_command(app), words[1:]
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]  # type: ignore[attr-defined]
        assert command is not typer.main.get_command(app), words
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if re.fullmatch(r"--?[a-z][a-z-]*", word)} <= {*options, "--help"}, words


def test_the_guide_to_training_has_its_steps() -> None:
    said = [words[1:3] for words in typed((ROOT / "docs" / "train.md").read_text(encoding="utf-8"))]
    steps = [next(n for n, words in enumerate(said) if words[: len(step)] == step) for step in (
        ["data", "fetch"], ["data", "check"], ["data", "plan"], ["search"], ["retrain"], ["crossval"], ["publish"],
    )]  # fmt: skip
    assert steps == sorted(steps)
