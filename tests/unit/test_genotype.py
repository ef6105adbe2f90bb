"""A genotype is accepted exactly when it is a feasible network, and survives the way to JSON and back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from dints_deploy.errors import DatasetError
from dints_search.genotype import OPERATIONS, Genotype, edges, from_published, parse_genotype, read_genotype

ZOO = Path(__file__).parents[2] / "zoo"
CVPR = ZOO / "dints-cvpr2021-pancreas" / "genotype.json"
TUTORIAL = ZOO / "dints-tutorial-sigma0.2" / "genotype.json"

Fields = dict[str, Any]
Matrix = NDArray[np.int64]


def fields(path: Path = CVPR) -> Fields:
    loaded: Fields = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def small(nodes: Matrix, active: Matrix) -> Fields:
    """Return the fields of a genotype of skip edges."""
    blocks, depths = len(active), nodes.shape[1]
    table = edges(depths)
    return {
        "schema_version": 1,
        "num_blocks": blocks,
        "num_depths": depths,
        "operations": list(OPERATIONS),
        "edge_in_level": [edge.in_level for edge in table],
        "edge_out_level": [edge.out_level for edge in table],
        "node_active": nodes.tolist(),
        "edge_active": active.tolist(),
        "edge_operation": np.zeros_like(active).tolist(),
    }


def accepts(candidate: Fields) -> bool:
    try:
        parse_genotype(json.dumps(candidate))
    except DatasetError:
        return False
    return True


def connections(active: Matrix, depths: int) -> Matrix:
    """Return the tri-diagonal matrix [out level, in level] of one block, filled row by row as the paper draws it."""
    matrix = np.zeros((depths, depths), dtype=np.int64)
    where = [(o, i) for o in range(depths) for i in range(depths) if abs(o - i) <= 1]
    for position, on in zip(where, active, strict=True):
        matrix[position] = on
    return matrix


def derived_nodes(active: Matrix, depths: int) -> Matrix | None:
    """Return the only rows of nodes that make the edges feasible, or None: an oracle without the code's loops."""
    matrices = [connections(row, depths) for row in active]
    left = [matrix.any(axis=0) for matrix in matrices]
    entered = [matrix.any(axis=1) for matrix in matrices]
    meets = all((a == b).all() for a, b in zip(entered[:-1], left[1:], strict=True))
    rows = np.array([left[0], *entered], dtype=np.int64)
    return rows if meets and rows.any(axis=1).all() else None


def bits(width: int) -> Iterator[tuple[int, ...]]:
    return itertools.product((0, 1), repeat=width)


@pytest.mark.parametrize(("path", "count"), [(CVPR, 97), (TUTORIAL, 58)])
def test_the_published_genotypes_are_feasible_and_have_their_published_number_of_edges(path: Path, count: int) -> None:
    genotype = read_genotype(path)
    assert sum(map(sum, genotype.edge_active)) == count
    assert genotype.up == "reference"


def test_the_cvpr_genotype_has_its_published_kinds_of_edges_and_operations() -> None:
    genotype = read_genotype(CVPR)
    rows = zip(genotype.edge_active, genotype.edge_operation, strict=True)
    used = [(edge.kind, o) for active, row in rows for edge, a, o in zip(edges(4), active, row, strict=True) if a]
    kinds, operations = zip(*used, strict=True)
    assert [kinds.count(kind) for kind in ("down", "keep", "up")] == [34, 41, 22]
    assert [operations.count(o) for o in range(5)] == [24, 33, 14, 12, 14]


def test_the_edges_of_four_levels_are_those_of_the_paper() -> None:
    table = edges(4)
    assert [edge.in_level for edge in table] == [0, 1, 0, 1, 2, 1, 2, 3, 2, 3]
    assert [edge.out_level for edge in table] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert [edge.kind for edge in table] == ["keep", *["up", "down", "keep"] * 3]


@pytest.mark.parametrize("depths", [2, 3, 4, 5])
def test_the_edges_join_every_pair_of_neighbouring_levels_once(depths: int) -> None:
    table = edges(depths)
    pairs = [(edge.out_level, edge.in_level) for edge in table]
    assert pairs == [(o, i) for o in range(depths) for i in range(depths) if abs(o - i) <= 1]
    assert len(table) == 3 * depths - 2
    sign = {"down": -1, "keep": 0, "up": 1}
    assert all(sign[edge.kind] == edge.in_level - edge.out_level for edge in table)


def test_every_combination_of_two_levels_and_two_blocks_is_accepted_exactly_when_feasible() -> None:
    accepted = 0
    for first, second in itertools.product(bits(4), repeat=2):
        active = np.array([first, second])
        oracle = derived_nodes(active, 2)
        for nodes in bits(6):
            rows = np.array(nodes).reshape(3, 2)
            feasible = oracle is not None and bool((rows == oracle).all())
            assert accepts(small(rows, active)) == feasible, (active, rows)
            accepted += feasible
    # The middle row is {0}, {1} or both: 3 patterns enter and 3 leave a single node, 3 * 3 each way for both.
    assert accepted == 3 * 3 + 3 * 3 + 9 * 9


def test_one_block_of_four_levels_has_1023_patterns_441_of_them_from_all_four_nodes() -> None:
    accepted, from_all = 0, 0
    for pattern in bits(10):
        active = np.array([pattern])
        matrix = connections(active[0], 4)
        nodes = np.array([matrix.any(axis=0), matrix.any(axis=1)], dtype=np.int64)
        if accepts(small(nodes, active)):
            accepted += 1
            from_all += bool(nodes[0].all())
    assert (accepted, from_all) == (1023, 441)


def _set(name: str, value: Any) -> Callable[[Fields], None]:
    def change(found: Fields) -> None:
        found[name] = value

    return change


def _set_at(name: str, row: int, column: int, value: Any) -> Callable[[Fields], None]:
    def change(found: Fields) -> None:
        found[name][row][column] = value

    return change


def _drop_row(name: str) -> Callable[[Fields], None]:
    def change(found: Fields) -> None:
        found[name].pop()

    return change


def _lengthen(name: str) -> Callable[[Fields], None]:
    def change(found: Fields) -> None:
        found[name][3].append(0)

    return change


def _silence_row(found: Fields) -> None:
    found["node_active"][5] = [0, 0, 0, 0]


REFUSED: list[tuple[str, Callable[[Fields], None], str]] = [
    ("schema of the future", _set("schema_version", 2), "schema_version: Input should be 1"),
    ("unknown key", _set("depth", 4), "depth: Extra inputs are not permitted"),
    ("unknown order", _set("up", "nearest"), "up: Input should be 'reference' or 'conv_first'"),
    ("one level", _set("num_depths", 1), "num_depths: Input should be greater than or equal to 2"),
    ("six levels", _set("num_depths", 6), "num_depths: Input should be less than or equal to 5"),
    ("no block", _set("num_blocks", 0), "num_blocks: Input should be greater than or equal to 1"),
    ("levels as text", _set("num_depths", "4"), "num_depths: Input should be a valid integer"),
    ("true for a bit", _set_at("edge_active", 2, 0, True), r"edge_active\.2\.0: Input should be a valid integer"),
    ("two for a bit", _set_at("node_active", 2, 0, 2), r"node_active\.2\.0: Input should be less than or equal to 1"),
    ("a sixth operation", _set_at("edge_operation", 2, 0, 5), r"edge_operation\.2\.0: Input should be less than 5"),
    ("a negative operation", _set_at("edge_operation", 2, 0, -1), r"edge_operation\.2\.0: Input should be greater"),
    ("operations in another order", _set("operations", list(reversed(OPERATIONS))), "expected operations"),
    ("another way in", _set("edge_in_level", [0, 0, 1, 1, 2, 1, 2, 3, 2, 3]), "expected edge_in_level"),
    ("another way out", _set("edge_out_level", [0, 1, 0, 1, 1, 2, 2, 2, 3, 3]), "expected edge_out_level"),
    ("three levels with the edges of four", _set("num_depths", 3), "expected edge_in_level .* at 3 levels"),
    ("one block too many", _set("num_blocks", 13), "expected node_active of 14 rows of 4"),
    ("a row of nodes missing", _drop_row("node_active"), "expected node_active of 13 rows of 4"),
    ("a row of edges missing", _drop_row("edge_active"), "expected edge_active of 12 rows of 10"),
    ("a row of operations missing", _drop_row("edge_operation"), "expected edge_operation of 12 rows of 10"),
    ("an edge too many", _lengthen("edge_active"), "expected edge_active of 12 rows of 10"),
    ("a row without nodes", _silence_row, "expected an active node in every row, found none in row 5"),
    (
        "an edge from an inactive input",
        _set_at("edge_active", 0, 9, 1),
        r"expected no active edge of block 0 to leave inactive node \(row 0, level 3\), found one",
    ),
    (
        "an edge into an inactive output",
        _set_at("edge_active", 11, 3, 1),
        r"expected no active edge of block 11 to enter inactive node \(row 12, level 1\), found one",
    ),
    (
        "an input that leads nowhere",
        _set_at("node_active", 0, 3, 1),
        r"expected an active edge of block 0 to leave active node \(row 0, level 3\), found none",
    ),
    (
        "an output that nothing enters",
        _set_at("node_active", 12, 1, 1),
        r"expected an active edge of block 11 to enter active node \(row 12, level 1\), found none",
    ),
    (
        "an inner node switched off",
        _set_at("node_active", 6, 2, 0),
        r"expected no active edge of block 5 to enter inactive node \(row 6, level 2\), found one",
    ),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_each_kind_of_fault_is_refused_with_its_place(change: Callable[[Fields], None], message: str) -> None:
    found = fields()
    change(found)
    with pytest.raises(DatasetError, match=message) as caught:
        parse_genotype(json.dumps(found))
    assert caught.value.code == "genotype-invalid"


@pytest.mark.parametrize("name", [name for name in fields() if name not in {"about", "source", "up"}])
def test_every_field_but_the_descriptive_ones_is_required(name: str) -> None:
    found = fields()
    del found[name]
    with pytest.raises(DatasetError, match=f"{name}: Field required"):
        parse_genotype(json.dumps(found))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", CVPR.read_text(encoding="utf-8")[:-10]])
def test_text_that_is_not_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(DatasetError) as caught:
        parse_genotype(text)
    assert caught.value.code == "genotype-invalid"


def test_a_file_that_is_missing_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere\.json"):
        read_genotype(tmp_path / "nowhere.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=r"bytes\.json"):
        read_genotype(tmp_path / "bytes.json")


def test_a_message_counts_the_errors_that_it_does_not_show() -> None:
    found = fields()
    found["edge_active"] = [[7] * 10] * 12
    with pytest.raises(DatasetError, match=r"edge_active\.0\.2: .*; and 117 more: correct the file"):
        parse_genotype(json.dumps(found))


def test_a_published_mapping_needs_no_schema_version_and_keeps_its_texts() -> None:
    found = fields()
    del found["schema_version"], found["up"]
    genotype = from_published(found)
    assert genotype == read_genotype(CVPR)
    assert genotype.source == found["source"] != ""
    assert genotype.about == found["about"] != ""


@pytest.mark.parametrize("path", [CVPR, TUTORIAL])
def test_the_zoo_files_are_what_to_json_writes(path: Path) -> None:
    assert read_genotype(path).to_json() == path.read_text(encoding="utf-8")


def test_a_genotype_cannot_be_changed() -> None:
    genotype = read_genotype(CVPR)
    with pytest.raises(ValidationError, match="frozen"):
        genotype.num_blocks = 3  # type: ignore[misc]


def test_the_digest_of_a_published_genotype_never_changes() -> None:
    assert read_genotype(CVPR).digest() == "971646b6ec192f3ba7cd6de472caacbb5aaa72782784ac09c9214ce296da2c90"
    assert read_genotype(TUTORIAL).digest() == "a6321671e085af4aca5242e140b687b1867050c401ab7298c9ae63b6c6ae830f"


def test_the_digest_ignores_words_and_unused_operations_and_sees_everything_else() -> None:
    genotype = read_genotype(CVPR)

    def digest_of(change: Callable[[Fields], None]) -> str:
        found = fields()
        change(found)
        return parse_genotype(json.dumps(found)).digest()

    same = [_set("about", "x"), _set("source", ""), _set_at("edge_operation", 0, 1, 4)]
    other = [
        _set("up", "conv_first"),
        _set("direct_skip", True),
        _set_at("edge_operation", 0, 0, 0),
        _set_at("edge_active", 1, 0, 0),
    ]
    assert {digest_of(change) for change in same} == {genotype.digest()}
    assert len({genotype.digest(), *(digest_of(change) for change in other)}) == 5


@st.composite
def feasible(draw: st.DrawFn) -> Genotype:
    depths = draw(st.integers(2, 5))
    table = edges(depths)
    nodes = [draw(st.sets(st.integers(0, depths - 1), min_size=1))]
    active = []
    for _ in range(draw(st.integers(1, 6))):
        leaving = [[e for e, edge in enumerate(table) if edge.in_level == level] for level in sorted(nodes[-1])]
        used = set().union(*(draw(st.sets(st.sampled_from(choices), min_size=1)) for choices in leaving))
        active.append([int(e in used) for e in range(len(table))])
        nodes.append({table[e].out_level for e in used})
    rows = [[int(level in row) for level in range(depths)] for row in nodes]
    found = small(np.array(rows), np.array(active))
    found["edge_operation"] = [[draw(st.integers(0, 4)) for _ in table] for _ in active]
    found["up"] = draw(st.sampled_from(["reference", "conv_first"]))
    found["about"] = draw(st.text(max_size=20))
    return parse_genotype(json.dumps(found))


@given(genotype=feasible())
@settings(max_examples=60, deadline=None)
def test_a_feasible_genotype_survives_the_way_to_json_and_back(genotype: Genotype) -> None:
    again = parse_genotype(genotype.to_json())
    assert again == genotype
    assert again.digest() == genotype.digest()
    assert genotype.to_json().count("\n") == 18 + 3 * genotype.num_blocks  # one row per line


@given(genotype=feasible(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_switching_any_one_node_makes_a_feasible_genotype_infeasible(genotype: Genotype, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, genotype.num_blocks))
    level = data.draw(st.integers(0, genotype.num_depths - 1))
    found = json.loads(genotype.to_json())
    found["node_active"][row][level] ^= 1
    assert not accepts(found)
