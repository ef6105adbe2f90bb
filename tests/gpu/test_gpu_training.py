"""What needs a GPU in the workshop: searching, retraining, teaching and measuring there give what the CPU gives."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dints_deploy.catalog.dataset import read_dataset
from dints_search.augment import Augmenter
from dints_search.evaluate import evaluate_run
from dints_search.metrics import read_metrics
from dints_search.recipe import Augmentation
from dints_search.retrain import retrain
from dints_search.search import search
from tests.tiny_task import tiny_genotype, tiny_recipe, tiny_search_recipe, write_task

pytestmark = pytest.mark.gpu
DEVICE = "cuda:0"
CLOSE = 0.02
"""Relative difference of a loss: convolutions on a GPU may round to TF32."""


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU on this machine")


def losses(run: Path, name: str) -> list[float]:
    """Return what the steps of a run lost."""
    return [float(line[name]) for line in read_metrics(run) if name in line]


def test_a_search_starts_on_the_gpu_as_on_the_cpu(tmp_path: Path) -> None:
    task = read_dataset(write_task(tmp_path / "task"))
    for device in ("cpu", DEVICE):
        search(tiny_search_recipe(tmp_path, steps=4), task, tmp_path / device, fold=0, device=device)
    cpu, cuda = (losses(tmp_path / device, "loss") for device in ("cpu", DEVICE))
    assert cuda[:2] == pytest.approx(cpu[:2], rel=CLOSE)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_search_in_half_precision_goes_on_where_it_stopped(tmp_path: Path, precision: str, compiled: bool) -> None:
    task = read_dataset(write_task(tmp_path / "task"))
    recipe = tiny_search_recipe(tmp_path, precision=precision, compiled=compiled)

    def stop(step: int, figures: object) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(recipe, task, tmp_path / "run", fold=0, device=DEVICE, report=stop)
    found = search(recipe, task, tmp_path / "run", fold=0, device=DEVICE, resume=True)
    search(recipe, task, tmp_path / "whole", fold=0, device=DEVICE)
    assert losses(tmp_path / "run", "loss") == pytest.approx(losses(tmp_path / "whole", "loss"), rel=10 * CLOSE)
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run", "loss"))
    assert all(parameter.isfinite().all() for parameter in found.network.architecture.parameters())


def test_a_run_is_taught_and_measured_on_the_gpu(tmp_path: Path) -> None:
    task, recipe = read_dataset(write_task(tmp_path / "task")), tiny_recipe(tmp_path, steps=60, learning_rate=0.01)
    first, second = tmp_path / "first", tmp_path / "second"
    retrain(recipe, tiny_genotype(), task, first, fold=0, device=DEVICE)
    retrain(recipe, tiny_genotype(), task, second, fold=0, device=DEVICE, origin=first, teachers=[first])
    measured = {device: evaluate_run(second, task, device=device)[1].summary.mean_dice for device in ("cpu", DEVICE)}
    assert measured[DEVICE] == pytest.approx(measured["cpu"], abs=0.01)


def test_patches_are_changed_on_the_gpu_as_on_the_cpu() -> None:
    """Noise apart, which every device draws from a generator of its own."""
    settings = Augmentation(rotation=1, scaling=1, translation=1, elastic=1, noise=0, blur=1, gamma=1, low_resolution=1)
    torch.manual_seed(0)
    image, label = torch.randn(3, 2, 20, 18, 22), torch.randint(3, (3, 1, 20, 18, 22))
    cpu = Augmenter(settings)(image, label, seeds=range(3))
    cuda = Augmenter(settings)(image.to(DEVICE), label.to(DEVICE), seeds=range(3))
    torch.testing.assert_close(cuda[0].cpu(), cpu[0], rtol=1e-3, atol=1e-3)
    assert (cuda[1].cpu() == cpu[1]).float().mean() > 0.999
