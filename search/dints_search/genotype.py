"""A Genotype: which nodes, edges and operations of the DiNTS search space a network is made of.

The space has L blocks and D levels (level 0 is the finest). Row b of `node_active` holds the nodes before block b,
the last row those after the last block. Edge e of block b leads from node `edge_in_level[e]` of row b to node
`edge_out_level[e]` of row b + 1 and carries one operation. A Genotype is feasible once built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dints_deploy.errors import DatasetError

OPERATIONS: Final = ("skip", "conv3x3x3", "p3d3x3x1", "p3d3x1x3", "p3d1x3x3")
"""The cell operations, in the order that `edge_operation` counts them."""

SHOWN_ERRORS: Final = 3
"""Errors that a message lists before it says that there are more."""

Bit = Annotated[int, Field(ge=0, le=1)]
OperationIndex = Annotated[int, Field(ge=0, lt=len(OPERATIONS))]
Kind = Literal["down", "keep", "up"]


class Edge(NamedTuple):
    """One of the 3D - 2 edges that every block has."""

    in_level: int
    out_level: int
    kind: Kind


def edges(num_depths: int) -> tuple[Edge, ...]:
    """Return the edges of a block of `num_depths` levels, ordered by the level they enter, then by the one they leave.

    Edge e enters level (e + 1) // 3 and leaves the level above it, the same or the one below.
    """
    table = []
    for e in range(1, 3 * num_depths - 1):
        out_level, offset = e // 3, e % 3 - 1
        kinds: tuple[Kind, ...] = ("down", "keep", "up")
        table.append(Edge(out_level + offset, out_level, kinds[offset + 1]))
    return tuple(table)


class Genotype(BaseModel):
    """A feasible network of the DiNTS search space.

    Attributes:
        up: where the network goes up inside a cell, `reference` upsamples, then convolves (as DiNTS does);
            `conv_first` convolves, then upsamples: an eighth of the work, but another function.
        searched_fold: the fold whose training part it was searched on, where it was: on cases of that part its network
            has no unbiased score.
        direct_skip: the head sees the scan at full resolution too, through one convolution, as an option of the
            authors' first code did; the finest nodes have half of it. The published networks have none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1]
    about: str = ""
    source: str = ""
    searched_fold: int | None = Field(default=None, ge=0, exclude_if=lambda fold: fold is None)
    num_blocks: int = Field(ge=1, le=64)
    num_depths: int = Field(ge=2, le=5)
    up: Literal["reference", "conv_first"] = "reference"
    direct_skip: bool = False
    operations: tuple[str, ...]
    edge_in_level: tuple[int, ...]
    edge_out_level: tuple[int, ...]
    node_active: tuple[tuple[Bit, ...], ...]
    edge_active: tuple[tuple[Bit, ...], ...]
    edge_operation: tuple[tuple[OperationIndex, ...], ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_tables(self)
        _check_shapes(self)
        _check_feasible(self)
        return self

    def to_json(self) -> str:
        """Return the genotype as JSON, one row of each table per line; `direct_skip` only where there is one."""
        fields = self.model_dump(exclude=None if self.direct_skip else {"direct_skip"})
        lines = [f"  {json.dumps(name)}: {_json_value(value)}" for name, value in fields.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def digest(self) -> str:
        """Return the SHA-256 of what defines the network's function: not where it is from, nor unused operations."""
        pairs = zip(self.edge_active, self.edge_operation, strict=True)
        code = [[o if a else -1 for a, o in zip(*rows, strict=True)] for rows in pairs]
        fields: dict[str, Any] = {
            "num_blocks": self.num_blocks,
            "num_depths": self.num_depths,
            "up": self.up,
            "operations": self.operations,
            "node_active": self.node_active,
            "edge_code": code,
        }
        if self.direct_skip:  # left out otherwise: digests from before it was there stay as they are
            fields["direct_skip"] = True
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_genotype(path: Path) -> Genotype:
    """Read a genotype file.

    Raises:
        DatasetError: `genotype-invalid` if the file cannot be read, is not JSON or holds no feasible genotype.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"expected a genotype file in UTF-8 at {path}, found {error}: check the path"
        raise DatasetError("genotype-invalid", message) from error
    return parse_genotype(text)


def parse_genotype(text: str) -> Genotype:
    """Read a genotype from JSON.

    Raises:
        DatasetError: `genotype-invalid` if the text is not JSON or holds no feasible genotype.
    """
    try:
        return Genotype.model_validate_json(text)
    except ValidationError as error:
        raise DatasetError("genotype-invalid", _message(error)) from error


def from_published(mapping: Mapping[str, Any]) -> Genotype:
    """Build a genotype from a published architecture: the same fields, without `schema_version`, `up` and
    `direct_skip`.

    Raises:
        DatasetError: `genotype-invalid` if the mapping holds no feasible genotype.
    """
    return parse_genotype(json.dumps({"schema_version": 1, "up": "reference", **mapping}))


def _check_tables(genotype: Genotype) -> None:
    table = edges(genotype.num_depths)
    expected = {
        "operations": OPERATIONS,
        "edge_in_level": tuple(edge.in_level for edge in table),
        "edge_out_level": tuple(edge.out_level for edge in table),
    }
    for name, value in expected.items():
        if getattr(genotype, name) != value:
            raise ValueError(
                f"expected {name} {value} at {genotype.num_depths} levels, found {getattr(genotype, name)}"
            )


def _check_shapes(genotype: Genotype) -> None:
    blocks, depths = genotype.num_blocks, genotype.num_depths
    expected = {
        "node_active": (blocks + 1, depths),
        "edge_active": (blocks, 3 * depths - 2),
        "edge_operation": (blocks, 3 * depths - 2),
    }
    for name, (rows, columns) in expected.items():
        found = [len(row) for row in getattr(genotype, name)]
        if found != [columns] * rows:
            raise ValueError(f"expected {name} of {rows} rows of {columns}, found rows of {found}")


def _check_feasible(genotype: Genotype) -> None:
    """Refuse edges without a node at both ends, nodes without an edge on a side that has a block, and empty rows."""
    table = edges(genotype.num_depths)
    for row, nodes in enumerate(genotype.node_active):
        if not any(nodes):
            raise ValueError(f"expected an active node in every row, found none in row {row}")
    for block, active in enumerate(genotype.edge_active):
        used = [edge for edge, on in zip(table, active, strict=True) if on]
        left = {edge.in_level for edge in used}
        entered = {edge.out_level for edge in used}
        _check_ends(genotype.node_active[block], row=block, levels=left, verb="leave", block=block)
        _check_ends(genotype.node_active[block + 1], row=block + 1, levels=entered, verb="enter", block=block)


def _check_ends(nodes: tuple[int, ...], *, row: int, levels: set[int], verb: str, block: int) -> None:
    """Check that the edges of a block touch exactly the active nodes of the row."""
    for level, on in enumerate(nodes):
        where = f"node (row {row}, level {level})"
        if on and level not in levels:
            raise ValueError(f"expected an active edge of block {block} to {verb} active {where}, found none")
        if not on and level in levels:
            raise ValueError(f"expected no active edge of block {block} to {verb} inactive {where}, found one")


def _json_value(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
    return json.dumps(value, ensure_ascii=False)


def _message(error: ValidationError) -> str:
    """Return one sentence with the dotted path of the first errors."""
    found = [
        f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" if item["loc"] else item["msg"]
        for item in error.errors(include_url=False, include_input=False)
    ]
    more = f"; and {len(found) - SHOWN_ERRORS} more" if len(found) > SHOWN_ERRORS else ""
    return f"expected a feasible genotype, found {'; '.join(found[:SHOWN_ERRORS])}{more}: correct the file"
