"""Each of the ten MSD recipes goes from data to a segmented scan: tiny scans of its channels, classes and spacing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydicom.sr._concepts_dict import concepts

from dints_deploy.catalog.dataset import Dataset, read_dataset
from dints_deploy.catalog.entry import Code
from dints_deploy.imaging.nifti import read_nifti, write_nifti
from dints_deploy.imaging.volume import Volume
from dints_search.choice import Choice, choose
from dints_search.evaluate import evaluate_run
from dints_search.genotype import Genotype
from dints_search.publish import publish
from dints_search.recipe import Recipe, find_recipe, override, read_recipe, recipe_folder
from dints_search.retrain import retrain
from dints_search.run import trained_network
from dints_search.search import search
from tests.tiny_entry import run_cli

# torch 2.13 calls its own deprecated isinstance check while it exports
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")

SPACINGS = {
    1: (1.0, 1.0, 1.0), 2: (1.25, 1.25, 1.37), 3: (0.77, 0.77, 1.0), 4: (1.0, 1.0, 1.0), 5: (0.62, 0.62, 3.6),
    6: (0.79, 0.79, 1.25), 7: (0.8, 0.8, 2.5), 8: (0.8, 0.8, 1.5), 9: (0.79, 0.79, 1.6), 10: (0.78, 0.78, 3.0),
}  # fmt: skip
"""Typical voxels of each task, in mm."""

EXTENT = 20.0
"""mm of a tiny scan along each axis."""

TINY = (
    "window = [16, 16, 16]", "accepts.extent_min = [1.0, 1.0, 1.0]", "accepts.shape_min = [1, 1, 1]",
    "accepts.spacing_max = [9.0, 9.0, 9.0]", "overlap = 0.0", "tta = []",
    "retraining.steps = 3", "retraining.channel_multiplier = 0.125", 'retraining.precision = "fp32"',
    "search.steps = 2", "search.num_blocks = 2", "search.num_depths = 2", "search.channel_multiplier = 0.0625",
    'search.precision = "fp32"', 'search.memory = "reference"', "search.window = [8, 8, 8]", "search.batch = 2",
)  # fmt: skip


def tiny(task: int) -> Recipe:
    """Return a task's recipe for tiny scans and a few steps."""
    return override(find_recipe(str(task)), TINY)


def write_msd(folder: Path, recipe: Recipe, spacing: tuple[float, ...], cases: int = 5) -> Dataset:
    """Write a dataset in MSD layout as the recipe declares it: nested blobs in noise, one class inside the other."""
    assert recipe.dataset is not None
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    affine = np.diag([*spacing, 1.0])
    pairs = []
    for number in range(cases + 1):
        rng = np.random.default_rng((number, len(recipe.labels)))
        image, label = scan(recipe, spacing, rng)
        name = f"case_{number}.nii.gz"
        if number == cases:
            write_nifti(folder / "imagesTs" / name, Volume(image, affine))
            continue
        write_nifti(folder / "imagesTr" / name, Volume(image, affine))
        write_nifti(folder / "labelsTr" / name, Volume(label[np.newaxis], affine))
        pairs.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    description = {
        "name": recipe.task,
        "modality": {str(n): name for n, name in enumerate(recipe.dataset.modality)},
        "labels": {str(n): name for n, name in enumerate(["background", *recipe.dataset.labels])},
        "training": pairs,
        "test": [f"./imagesTs/case_{cases}.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return read_dataset(folder)


def scan(
    recipe: Recipe, spacing: tuple[float, ...], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return an image (C, I, J, K) and its label, in Hounsfield-like units where the recipe cuts a window out."""
    shape = [round(EXTENT / mm) for mm in spacing]
    centre = EXTENT / 2 + rng.uniform(-1, 1, 3)
    places = [(index + 0.5) * mm - c for index, mm, c in zip(np.indices(shape), spacing, centre, strict=True)]
    distance = np.sqrt(sum(place**2 for place in places))
    label = np.zeros(shape, np.uint8)
    for value in range(1, len(recipe.labels) + 1):
        label[distance < 8.5 - 2.2 * (value - 1)] = value
    image = 40.0 * label + rng.normal(0, 8, (len(recipe.channels), *shape))
    return image.astype(np.float32), label


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose zoo is the only one."""
    folder = tmp_path_factory.mktemp("ten")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINTS_ZOO", str(folder / "zoo"))
        patch.setenv("DINTS_STATE", str(folder / "state"))
        torch.set_num_threads(1)
        yield folder


@pytest.mark.parametrize("task", range(1, 11))
def test_a_recipe_goes_from_data_to_a_segmented_scan(task: int, place: Path) -> None:
    recipe = tiny(task)
    folder = place / recipe.task
    dataset = write_msd(folder, recipe, SPACINGS[task])
    genotype = found(recipe, dataset, place / f"search{task}")
    run = place / f"run{task}"
    retrain(recipe, genotype, dataset, run, fold=0)
    _, measured = evaluate_run(run, dataset)
    assert [set(scores.dice) for scores in measured.cases.values()] == [set(recipe.label_names)]
    name = recipe.task.lower().replace("_", "-")
    publish([run], name, dataset, place / "zoo")
    said = run_cli("segment", folder / "imagesTs" / "case_5.nii.gz", "-o", place / f"out{task}.nii.gz")
    assert said.code == 0, said.err
    assert f"{name} 1.0.0" in said.out
    labels, original = read_nifti(place / f"out{task}.nii.gz"), read_nifti(folder / "imagesTs" / "case_5.nii.gz")
    assert labels.grid.same_as(original.grid)
    assert set(np.unique(labels.data)) <= {0, *recipe.label_names}
    (place / "zoo" / name).rename(place / f"done{task}")  # so that the next task's entry is the only one


def found(recipe: Recipe, dataset: Dataset, folder: Path) -> Genotype:
    """Search for a few steps and decode."""
    return choose(search(recipe, dataset, folder, fold=0).network.architecture, Choice(), recipe).genotype


def test_a_genotype_searched_on_one_task_retrains_on_anothers_channels_and_classes(place: Path) -> None:
    recipe = tiny(7)
    searched_on = write_msd(place / "searched", recipe, SPACINGS[7])
    genotype = found(recipe, searched_on, place / "search-elsewhere")
    other = tiny(1)
    dataset = write_msd(place / "other", other, SPACINGS[1])
    retrain(other, genotype, dataset, place / "run-other", fold=1)
    _, network = trained_network(place / "run-other")
    assert network.genotype == genotype
    assert network(torch.zeros(1, 4, 16, 16, 16)).shape == (1, 4, 16, 16, 16)


RECIPES = sorted(recipe_folder().glob("*.toml"))


def test_there_is_a_recipe_for_each_of_the_ten_tasks_and_each_is_found_by_number_and_name() -> None:
    assert [path.name[:6] for path in RECIPES] == [f"task{n:02}" for n in range(1, 11)]
    for path in RECIPES:
        recipe = read_recipe(path)
        number, name = recipe.task.removeprefix("Task").split("_")
        for word in (number, str(int(number)), name, name.lower(), recipe.task, str(path)):
            assert find_recipe(word) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_code_is_in_the_dictionary_of_dicom_or_in_a_private_scheme(path: Path) -> None:
    meanings: dict[tuple[str, str], set[str]] = {}
    for scheme in ("SCT", "NCIt"):
        for codes in concepts[scheme].values():
            for value, (meaning, _) in codes.items():
                meanings.setdefault((scheme, value), set()).add(meaning)
    for label in read_recipe(path).labels:
        for code in codes_of(label):
            if code.scheme != "99DINTS":
                assert code.meaning in meanings[code.scheme, code.value], code


def codes_of(label: Any) -> list[Code]:
    return [code for code in (label.category, label.type, label.modifier) if code is not None]


FACTS: dict[int, tuple[dict[str, str], float, list[float], list[float]]] = {
    1: (
        {"edema": "edema", "non-enhancing tumor": "tumour-non-enhancing", "enhancing tumour": "tumour-enhancing"},
        5, [68.04, 46.81, 68.46, 61.10], [69.28, 48.65, 69.75, 62.56],
    ),
    2: ({"left atrium": "left-atrium"}, 4, [93.30, 93.30], [92.99, 92.99]),
    3: ({"liver": "liver", "cancer": "liver-tumour"}, 7, [95.75, 75.97, 85.86], [95.35, 74.62, 84.99]),
    4: (
        {"Anterior": "hippocampus-anterior", "Posterior": "hippocampus-posterior"},
        1, [90.23, 88.69, 89.46], [89.91, 88.41, 89.16],
    ),
    5: (
        {"PZ": "prostate-peripheral-zone", "TZ": "prostate-transition-zone"},
        4, [76.59, 89.62, 83.11], [75.37, 89.25, 82.31],
    ),
    6: ({"cancer": "lung-tumour"}, 2, [73.97, 73.97], [74.75, 74.75]),
    7: ({"pancreas": "pancreas", "cancer": "pancreas-tumour"}, 5, [81.64, 52.78, 67.21], [81.02, 55.35, 68.19]),
    8: ({"Vessel": "hepatic-vessel", "Tumour": "liver-tumour"}, 3, [66.46, 71.78, 69.12], [64.50, 71.76, 68.13]),
    9: ({"spleen": "spleen"}, 3, [97.43, 97.43], [96.98, 96.98]),
    10: ({"colon cancer primaries": "colon-tumour"}, 4, [58.33, 58.33], [59.21, 59.21]),
}  # fmt: skip
"""Each task's labels in order, as its dataset.json and as we name them; the tolerance of their surface Dice in mm; from
the paper's table, in %, the Dice of nnU-Net and of DiNTS per label, then their mean."""

OVERALL = {"nnU-Net": (77.89, 88.09), "C2FNAS": (76.97, 87.83), "DiNTS": (77.93, 88.68)}
"""The paper's mean of Dice and of surface Dice over the ten tasks, in %."""


@pytest.mark.parametrize("task", FACTS)
def test_a_recipe_has_the_labels_the_tolerances_and_the_published_dice_of_its_task(task: int) -> None:
    recipe = find_recipe(str(task))
    labels, tolerance, nnunet, dints = FACTS[task]
    assert recipe.dataset is not None
    assert recipe.dataset.labels == tuple(labels)
    assert [(label.value, label.id) for label in recipe.labels] == list(enumerate(labels.values(), 1))
    assert [label.nsd_tolerance for label in recipe.labels] == [tolerance] * len(labels)
    assert [scores.method for scores in recipe.published] == list(OVERALL)
    for scores, expected in zip(recipe.published[::2], (nnunet, dints), strict=True):
        dice = [100 * score for score in scores.dice]
        assert [*dice, np.mean(dice)] == pytest.approx(expected, abs=0.006)  # the mean is printed with two digits


def test_the_published_scores_have_the_means_over_all_tasks_that_the_paper_has() -> None:
    published = [read_recipe(path).published for path in RECIPES]
    for scores in zip(*published, strict=True):
        dice, nsd = (100 * np.mean([np.mean(getattr(s, metric)) for s in scores]) for metric in ("dice", "nsd"))
        assert (dice, nsd) == pytest.approx(OVERALL[scores[0].method], abs=0.006)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_window_suits_the_space(path: Path) -> None:
    recipe = read_recipe(path)
    assert all(n % 2**recipe.search.num_depths == 0 for n in recipe.window)
