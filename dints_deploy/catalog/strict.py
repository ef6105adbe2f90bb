"""Strict files: a TOML or JSON file is a frozen pydantic model, and an unknown key is an error with its dotted path."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dints_deploy.errors import DintsError

MAX_TEXT_BYTES = 8 << 20
"""Largest configuration file that is read."""


class Strict(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


Model = TypeVar("Model", bound=BaseModel)


def read_toml(path: Path, model: type[Model], error: type[DintsError], code: str) -> Model:
    """Read a TOML file into `model`; raise `error` with `code`, naming the file and the dotted path of each fault."""
    try:
        return model.model_validate(tomllib.loads(_text(path)))
    except (ValueError, OSError, RecursionError) as fault:
        raise error(code, f"expected {_name(path)} to follow its schema, found: {faults(fault)}") from fault


def read_json(path: Path, model: type[Model], error: type[DintsError], code: str) -> Model:
    """Read a JSON file into `model`; raise `error` with `code`, naming the file and the dotted path of each fault."""
    try:
        return model.model_validate_json(_text(path))
    except (ValueError, OSError, RecursionError) as fault:
        raise error(code, f"expected {_name(path)} to follow its schema, found: {faults(fault)}") from fault


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"more than {MAX_TEXT_BYTES} bytes")
    return path.read_text(encoding="utf-8")


def faults(fault: Exception) -> str:
    """Say in one line what a parser or a model found wrong, without repeating the values."""
    if not isinstance(fault, ValidationError):
        return str(fault)
    details = fault.errors(include_url=False, include_context=False, include_input=False)
    places = [".".join(str(part) for part in d["loc"]) for d in details]
    said = [d["msg"].removeprefix("Value error, ") for d in details]
    return "; ".join(f"{place}: {fault}" if place else fault for place, fault in zip(places, said, strict=True))
