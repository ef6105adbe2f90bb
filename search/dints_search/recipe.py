"""A recipe: everything about one task that a person decides, in one strict TOML file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from dints_deploy.catalog.entry import (
    Accepts,
    Axis,
    GeometryPolicy,
    Label,
    Postprocess,
    check_distinct,
    check_postprocess,
    check_softmax,
)
from dints_deploy.catalog.preparation import Channel, Preparation, Sizes, Spacing
from dints_deploy.catalog.strict import Strict, faults, read_toml
from dints_deploy.errors import DatasetError
from dints_search.searching import Searching, Width

Probability = Annotated[float, Field(ge=0, le=1)]


Range = tuple[PositiveFloat, PositiveFloat]


class Augmentation(Strict):
    """Probabilities and ranges of the augmentations; a probability of 0 turns one off. The defaults are nnU-Net's.

    Attributes:
        rotation_range: radians, at most this much around i, j and k.
        scaling_range: factors of size. translation_range: voxels, at most this much along i, j and k.
        elastic_voxels: standard deviation of the shifts of the control points of an elastic deformation.
        mirror: axes that are flipped at random, each with probability 0.5.
        flat: axis along which patches have few voxels, or thick ones: they turn around it only, and are scaled, bent
            and made coarse across it, not along it. Turned out of their planes they would show what lies around them.
    """

    rotation: Probability = 0.2
    rotation_range: tuple[float, float, float] = (0.5236, 0.5236, 0.5236)
    scaling: Probability = 0.2
    scaling_range: Range = (0.7, 1.4)
    translation: Probability = 0.0
    translation_range: tuple[float, float, float] = (4.0, 4.0, 4.0)
    elastic: Probability = 0.0
    elastic_voxels: NonNegativeFloat = 2.0
    noise: Probability = 0.1
    noise_std: NonNegativeFloat = 0.1
    blur: Probability = 0.2
    blur_sigma: Range = (0.5, 1.0)
    brightness: Probability = 0.15
    brightness_range: Range = (0.75, 1.25)
    contrast: Probability = 0.15
    contrast_range: Range = (0.75, 1.25)
    low_resolution: Probability = 0.25
    low_resolution_range: Range = (0.5, 1.0)
    gamma_of_negative: Probability = 0.1
    gamma: Probability = 0.3
    gamma_range: Range = (0.7, 1.5)
    mirror: tuple[Axis, ...] = ("i", "j", "k")
    flat: Axis | None = Field(default=None, exclude_if=lambda axis: axis is None)


class Retraining(Strict):
    """How a discrete network is trained.

    Attributes:
        steps: optimiser steps; the learning rate falls to zero at the last.
        foreground: share of patches centred on a labelled voxel, where a scan is larger than the window.
        weight_decay: of the convolutions' weights; norms and biases are left alone.
        ema: decay per step of the averaged weights, which are the ones published.
        teaching: share of the target that is the teachers' opinion, where there are teachers.
    """

    steps: PositiveInt
    batch: PositiveInt = 2
    learning_rate: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 3e-2
    warmup_steps: NonNegativeInt = 100
    clip_norm: PositiveFloat = 5.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    foreground: Probability = 0.5
    channel_multiplier: Width = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    checkpoint_every: PositiveInt = 250
    augmentation: Augmentation = Augmentation()
    teaching: Probability = Field(default=0.5, exclude_if=lambda share: share == 0.5)


class Declared(Strict):
    """What the `dataset.json` of the recipe's task says, so that another folder, or another order, is noticed.

    Attributes:
        modality: names of the channels, in order. labels: names of the labels 1, 2 ..., in order.
        training: number of labelled cases. test: number of those without labels. For the record: copies differ.
    """

    modality: tuple[str, ...] = Field(min_length=1)
    labels: tuple[str, ...] = Field(min_length=1)
    training: PositiveInt | None = None
    test: NonNegativeInt | None = None


class Published(Strict):
    """Scores of a method on the task's test set, to compare with: per label, 0 to 1."""

    method: str
    dice: tuple[Probability, ...]
    nsd: tuple[Probability, ...]


class Recipe(Strict):
    """One task: what comes in, what comes out, how it is trained."""

    schema_version: Literal[1]
    task: str
    title: str
    intended_use: str
    not_for: str
    licence: str
    dataset: Declared | None = None
    channels: tuple[Channel, ...] = Field(min_length=1)
    labels: tuple[Label, ...] = Field(min_length=1)
    spacing: Spacing | None = None
    window: Sizes
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    tta: tuple[Axis, ...] = ()
    accepts: Accepts
    geometry: GeometryPolicy = GeometryPolicy()
    postprocess: Postprocess = Postprocess()
    published: tuple[Published, ...] = ()
    search: Searching = Searching()
    retraining: Retraining

    @model_validator(mode="after")
    def _publishable(self) -> Recipe:
        """Keep the rules of the entry that the recipe will become: nobody trains for hours in vain."""
        check_distinct(self.channels, self.labels, self.tta)
        check_postprocess(self.postprocess, self.labels)
        check_softmax(self.labels)
        declared = self.dataset
        if declared and (len(declared.modality), len(declared.labels)) != (len(self.channels), len(self.labels)):
            raise ValueError("expected a modality in [dataset] for every channel and a label for every label")
        if any({len(p.dice), len(p.nsd)} != {len(self.labels)} for p in self.published):
            raise ValueError("expected a published score for every label")
        return self

    @property
    def preparation(self) -> Preparation:
        """Return how a scan becomes network input."""
        return Preparation(channels=self.channels, spacing=self.spacing, window=self.window)

    @property
    def label_names(self) -> dict[int, str]:
        """Return label value -> name."""
        return {label.value: label.name for label in self.labels}


def recipe_folder() -> Path:
    """Return where the recipes lie: inside the installed package, or in the checkout."""
    installed = Path(__file__).parent / "_recipes"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "recipes"


def find_recipe(task: str) -> Recipe:
    """Return the recipe of a task by number (4, 04), name (hippocampus) or full name (Task04_Hippocampus), or by path.

    A name may be cut short (brain).

    Raises:
        DatasetError: `recipe-invalid`, listing the tasks there are.
    """
    if task.endswith(".toml"):
        return read_recipe(Path(task))
    files = {path.stem: path for path in sorted(recipe_folder().glob("*.toml"))}
    if name := match_task(task, files):
        return read_recipe(files[name])
    known = ", ".join(files)
    raise DatasetError("recipe-invalid", f"expected a task with a recipe ({known}), found {task!r}")


def match_task(task: str, names: Iterable[str]) -> str | None:
    """Return which of names such as Task04_Hippocampus a person means by a number, a name or its beginning."""
    wanted = task.lower()
    begins = []
    for name in names:
        number, _, short = name.lower().removeprefix("task").partition("_")
        if wanted in (name.lower(), short, number, number.lstrip("0")):
            return name
        if wanted.isalpha() and short.startswith(wanted):
            begins.append(name)
    return begins[0] if len(begins) == 1 else None


def with_steps(recipe: Recipe, steps: int | None) -> Recipe:
    """Return the recipe with another number of retraining steps; None leaves it as it is."""
    if steps is None:
        return recipe
    return recipe.model_copy(update={"retraining": recipe.retraining.model_copy(update={"steps": steps})})


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Return the recipe with figures replaced, each given as NAME=VALUE: a dotted path, and a value as in TOML.

    Entries of a list are numbered from 0: `labels.1.nsd_tolerance=2`.

    Raises:
        DatasetError: `recipe-invalid` when a path or a value is not one of a recipe.
    """
    fields = recipe.model_dump(mode="json", exclude_none=True)
    for setting in settings:
        path, _, text = setting.partition("=")
        *parents, last = path.strip().split(".")
        place: Any = fields
        try:
            for parent in parents:
                place = place[_number(parent)] if isinstance(place, list) else place.setdefault(parent, {})
            value = tomllib.loads(f"value = {text}")["value"]
            place[_number(last) if isinstance(place, list) else last] = value
        except (ValueError, AttributeError, TypeError, IndexError) as error:
            raise DatasetError("recipe-invalid", f"expected NAME=VALUE as in the recipe, found {setting!r}") from error
    try:
        return Recipe.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise DatasetError(
            "recipe-invalid", f"expected a recipe with {', '.join(settings)}, found: {faults(error)}"
        ) from error


def _number(text: str) -> int:
    """Return the number of a list's entry; raise `ValueError` for what is none, such as -1."""
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file; raise `DatasetError` (`recipe-invalid`) with the dotted path of each fault."""
    return read_toml(path, Recipe, DatasetError, "recipe-invalid")
