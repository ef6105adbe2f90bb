"""`entry.toml` is strict: an unknown key is refused by its dotted path, a known one survives a round trip."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dints_deploy.catalog.catalog import read_entry
from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import DatasetError, EntryError
from dints_search.recipe import read_recipe, recipe_folder
from tests.tiny_entry import Fields, entry_fields, label_fields

ZOO = Path(__file__).parents[2] / "zoo"

FREE_MAPS = {"postprocess.min_volume_ml", "training.cases"}
"""Tables whose keys are data: label ids and case ids."""

WINDOWED = {"scheme": "window", "lower": -100.0, "upper": 300.0, "mean": 50.0, "std": 20.0}


def full_fields() -> Fields:
    """Return an entry that uses every table there is."""
    modifier = {"value": "7771000", "scheme": "SCT", "meaning": "Left"}
    return entry_fields(
        ensemble=2,
        channels=[
            {"name": "T1", "modality": "MR", "intensity": {"scheme": "zscore"}, "series": {"description": ["*t1*"]}},
            {"name": "CT", "modality": "CT", "intensity": dict(WINDOWED), "fill": "minimum"},
            {"name": "PT", "modality": "PT", "intensity": {"scheme": "identity"}},
        ],
        labels=[label_fields(1) | {"modifier": modifier}, label_fields(2)],
        activation="sigmoid",
        regions=[{"name": "whole", "labels": [1, 2], "value": 1}, {"name": "core", "labels": [2], "value": 2}],
        spacing=[1.0, 1.5, 2.0],
        tta=["i", "k"],
        geometry={"tilt": "regularise"},
        postprocess={"keep_largest": [1], "min_volume_ml": {"part-1": 0.5}},
        parity={"max_abs_logit": 0.01},
        training={"task": "T", "fold": 0, "cases": {"a": "0" * 64}},
        genotype="genotype.json",
    )


def read(folder: Path, fields: Fields) -> Entry:
    (folder / "entry.toml").write_text(tomli_w.dumps(fields), encoding="utf-8")
    return read_entry(folder)


def refusal(folder: Path, fields: Fields) -> str:
    with pytest.raises(EntryError) as caught:
        read(folder, fields)
    assert caught.value.code == "entry-invalid"
    return caught.value.message


def tables(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every table in `value` whose keys are fixed."""
    if isinstance(value, dict):
        if ".".join(path) not in FREE_MAPS:
            yield path
        for key, inner in value.items():
            yield from tables(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from tables(inner, (*path, str(number)))


def at(value: Any, path: tuple[str, ...]) -> Any:
    """Return what lies at a path of tables and lists."""
    for part in path:
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


@pytest.mark.parametrize("path", list(tables(full_fields())), ids=lambda path: ".".join(path) or "top")
def test_an_unknown_key_in_any_table_is_refused_by_its_dotted_path(path: tuple[str, ...], tmp_path: Path) -> None:
    fields = full_fields()
    read(tmp_path, fields)
    table = at(fields, path)
    table["surprise"] = 1
    shown = (*path, table["scheme"]) if path[-1:] == ("intensity",) else path  # the scheme tells which table it is
    assert f"{'.'.join((*shown, 'surprise'))}: " in refusal(tmp_path, fields)


@pytest.mark.parametrize("path", [p for p in tables(full_fields()) if p], ids=lambda path: ".".join(path))
def test_a_text_in_place_of_a_table_is_refused_by_its_dotted_path(path: tuple[str, ...], tmp_path: Path) -> None:
    fields = full_fields()
    parent = at(fields, path[:-1])
    parent[int(path[-1]) if isinstance(parent, list) else path[-1]] = "text"
    assert ".".join(path) in refusal(tmp_path, fields)


RULES: list[tuple[str, Fields, str]] = [
    ("two labels of one value", {"labels": [label_fields(1), label_fields(1) | {"id": "b"}]}, "distinct values"),
    ("two labels of one id", {"labels": [label_fields(1), label_fields(2) | {"id": "part-1"}]}, "distinct values"),
    ("a gap in softmax values", {"labels": [label_fields(1), label_fields(3)]}, "label values 1..n"),
    ("regions for softmax", {"regions": [{"name": "a", "labels": [1], "value": 1}]}, "activation = 'sigmoid'"),
    ("sigmoid without regions", {"activation": "sigmoid"}, "needs regions"),
    (
        "a region of an unknown label",
        {"activation": "sigmoid", "regions": [{"name": "a", "labels": [1, 7], "value": 1}]},
        "region 'a'",
    ),
    (
        "a region written as an unknown value",
        {"activation": "sigmoid", "regions": [{"name": "a", "labels": [1], "value": 7}]},
        "region 'a'",
    ),
    ("the largest part of an unknown label", {"postprocess": {"keep_largest": [7]}}, "postprocess"),
    ("a least volume of an unknown label", {"postprocess": {"min_volume_ml": {"part-7": 1.0}}}, "postprocess"),
    ("one axis mirrored twice", {"tta": ["i", "i"]}, "distinct axes"),
    ("one network twice", {"members": [{"onnx": "m.onnx"}, {"onnx": "m.onnx"}]}, "distinct files"),
    ("channels of one name", {"channels": entry_fields()["channels"] * 2}, "distinct channel names"),
    ("no channel", {"channels": []}, "channels"),
    ("no label", {"labels": []}, "labels"),
    ("a window without depth", {"window": [8, 0, 8]}, "window.1"),
    ("a flat window", {"window": [8, 8]}, "window"),
    ("a spacing of zero", {"spacing": [1, 0, 1]}, "spacing.1"),
    ("an overlap of one", {"overlap": 1.0}, "overlap"),
    ("another schema", {"schema_version": 2}, "schema_version"),
    ("a name with a slash", {"name": "a/b"}, "name"),
    ("a name of dots", {"name": ".."}, "name"),
    ("a version in words", {"version": "new"}, "version"),
    ("an unknown activation", {"activation": "tanh"}, "activation"),
    ("an extent upside down", {"accepts": entry_fields()["accepts"] | {"extent_max": [0.5, 9, 9]}}, "extent_min"),
    ("a spacing upside down", {"accepts": entry_fields()["accepts"] | {"spacing_max": [9, 9, 0.05]}}, "spacing_min"),
    ("no modality", {"accepts": entry_fields()["accepts"] | {"modality": []}}, "accepts.modality"),
    ("a colour beyond 255", {"labels": [label_fields(1) | {"colour": [0, 0, 256]}]}, "labels.0.colour.2"),
]


@pytest.mark.parametrize(("change", "said"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_what_contradicts_itself_is_refused(change: Fields, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, entry_fields() | change)


INTENSITIES: list[tuple[Fields, str]] = [
    ({"scheme": "zscore", "clip_percentiles": [99.0, 1.0]}, "lower < upper"),
    ({"scheme": "zscore", "clip_percentiles": [0.0, 101.0]}, "lower < upper"),
    ({"scheme": "window", "lower": 5.0, "upper": 5.0}, "lower < upper"),
    ({"scheme": "window", "lower": 0.0, "upper": 5.0, "mean": 1.0}, "mean and std together"),
    ({"scheme": "window", "lower": 0.0, "upper": 5.0, "mean": 1.0, "std": 0.0}, "std"),
    ({"scheme": "magic"}, "intensity"),
]


@pytest.mark.parametrize(("intensity", "said"), INTENSITIES)
def test_an_impossible_intensity_scheme_is_refused(intensity: Fields, said: str, tmp_path: Path) -> None:
    channel = {"name": "MR", "modality": "MR", "intensity": intensity}
    message = refusal(tmp_path, entry_fields(channels=[channel]))
    assert said in message
    assert "channels.0.intensity" in message


LEAVING = ["../model.onnx", "/etc/passwd", "a/../../model.onnx", "a/..", "..", "a\\..\\model.onnx", "", "."]


@pytest.mark.parametrize("path", LEAVING)
def test_a_path_that_leaves_the_entry_is_refused_wherever_it_stands(path: str, tmp_path: Path) -> None:
    assert "members.0.onnx: " in refusal(tmp_path, entry_fields() | {"members": [{"onnx": path}]})
    assert "genotype: " in refusal(tmp_path, entry_fields() | {"genotype": path})


@pytest.mark.parametrize("text", ["a = [", "a = " + "[" * 100_000, "a = 1\na = 2\n", "\x00", "schema_version = 1e400"])
def test_a_file_that_is_no_toml_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "entry.toml").write_text(text, encoding="utf-8")
    with pytest.raises(EntryError) as caught:
        read_entry(tmp_path)
    assert caught.value.code == "entry-invalid"


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "entry.toml").write_bytes("title = 'Kürbis'".encode("latin-1"))
    with pytest.raises(EntryError, match="schema"):
        read_entry(tmp_path)


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "entry.toml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(EntryError, match="more than"):
        read_entry(tmp_path)


def texts() -> st.SearchStrategy[str]:
    return st.text(min_size=1, max_size=20)


def numbers() -> st.SearchStrategy[float]:
    return st.floats(0.01, 1e6)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    """Draw entries of every scheme, with and without what is optional."""
    triple = st.tuples(numbers(), numbers(), numbers())
    intensity = st.one_of(
        st.just({"scheme": "identity"}),
        st.builds(lambda low: {"scheme": "window", "lower": low, "upper": low + 1}, st.floats(-1e5, 1e5)),
        st.just(WINDOWED),
        st.builds(lambda p, z: {"scheme": "zscore", "clip_percentiles": p, "nonzero": z},
                  st.none() | st.tuples(st.floats(0, 49), st.floats(50, 100)), st.booleans()),
    )  # fmt: skip
    fields = full_fields() | {
        "title": draw(texts()),
        "not_for": draw(st.text(max_size=40)),
        "spacing": draw(st.none() | triple),
        "overlap": draw(st.floats(0, 0.99)),
        "window": draw(st.tuples(*[st.integers(1, 999)] * 3)),
        "tta": draw(st.lists(st.sampled_from("ijk"), unique=True)),
        "channels": [{"name": "A", "modality": "MR", "intensity": draw(intensity)}],
        "genotype": draw(st.none() | st.just("genotype.json")),
        "members": draw(st.sampled_from([[], [{"onnx": "a/b.onnx"}], [{"onnx": "m.onnx", "fold": 0, "seed": None}]])),
        "training": draw(
            st.none()
            | st.builds(lambda cases: {"task": "T", "cases": cases}, st.dictionaries(texts(), texts(), max_size=3))
        ),
    }
    if draw(st.booleans()):
        fields |= {"activation": "softmax", "regions": []}
    return Entry.model_validate(fields)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entry=entries())
def test_an_entry_survives_the_way_to_toml_and_back(entry: Entry, tmp_path: Path) -> None:
    assert read(tmp_path, entry.model_dump(mode="json", exclude_none=True)) == entry


def test_an_entry_without_spacing_keeps_the_scans_own(tmp_path: Path) -> None:
    entry = read(tmp_path, entry_fields())
    assert entry.spacing is None
    assert entry.preparation.spacing is None


def test_a_softmax_network_has_a_channel_for_the_background_and_a_sigmoid_one_has_none(tmp_path: Path) -> None:
    assert read(tmp_path, entry_fields(classes=4)).outputs == 4
    assert read(tmp_path, full_fields()).outputs == 2


def test_an_entry_cannot_be_changed_after_it_is_read(tmp_path: Path) -> None:
    entry = read(tmp_path, entry_fields())
    with pytest.raises(ValueError, match="frozen"):
        entry.overlap = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in ZOO.glob("*/entry.toml")))
def test_every_shipped_entry_carries_the_name_of_its_folder(folder: str) -> None:
    assert read_entry(ZOO / folder).name == folder


RECIPE_FAULTS: list[tuple[Fields, str]] = [
    ({"surprise": 1}, "surprise: "),
    ({"labels": [label_fields(1), label_fields(3)]}, "label values 1..n"),
    ({"labels": [label_fields(1), label_fields(2) | {"id": "part-1"}]}, "distinct values"),
    ({"channels": entry_fields()["channels"] * 2}, "distinct channel names"),
    ({"tta": ["i", "i"]}, "distinct axes"),
    ({"postprocess": {"keep_largest": [7]}}, "postprocess"),
]


@pytest.mark.parametrize(("change", "said"), RECIPE_FAULTS)
def test_a_recipe_that_could_never_be_published_is_refused_before_training(
    change: Fields, said: str, tmp_path: Path
) -> None:
    original = read_recipe(recipe_folder() / "task04_hippocampus.toml").model_dump(mode="json", exclude_none=True)
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(copy.deepcopy(original)), encoding="utf-8")
    assert read_recipe(path).model_dump(mode="json", exclude_none=True) == original
    path.write_text(tomli_w.dumps(original | change), encoding="utf-8")
    with pytest.raises(DatasetError, match=said.replace(".", r"\.")) as caught:
        read_recipe(path)
    assert caught.value.code == "recipe-invalid"
