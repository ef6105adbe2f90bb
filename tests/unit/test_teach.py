"""Teachers shift the target as told, see what the network sees, and know no case that a training leaves out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from dints_deploy.catalog.dataset import read_dataset
from dints_deploy.errors import DatasetError
from dints_search.evaluate import entry_of
from dints_search.genotype import Genotype, parse_genotype
from dints_search.recipe import Retraining
from dints_search.retrain import retrain, start, train_step
from dints_search.run import read_config
from dints_search.segmentation_loss import segmentation_loss
from dints_search.teach import Teachers
from tests.tiny_task import tiny_genotype, tiny_recipe, write_task

SHAPE = (2, 3, 5, 4, 6)


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny task and finished runs: two of fold 0, one of fold 1 and one of another width."""
    folder = tmp_path_factory.mktemp("school")
    write_task(folder / "task")
    runs: list[tuple[str, dict[str, Any]]] = [
        ("a", {}),
        ("b", {"seed": 1}),
        ("other-fold", {"fold": 1}),
        ("wide", {"channel_multiplier": 0.25}),
        ("other-network", {"genotype": skipping()}),
    ]
    for name, options in runs:
        learn(folder, folder / name, **options)
    return folder


def learn(folder: Path, run: Path, *, fold: int = 0, **options: Any) -> Path:
    """Train the tiny task in fp32; options that are no argument of `retrain` change the recipe."""
    genotype = options.pop("genotype", tiny_genotype())
    names = {"origin", "teachers", "resume", "report", "without", "seed"}
    arguments = {name: options.pop(name) for name in names & set(options)}
    run.parent.mkdir(exist_ok=True)
    recipe = tiny_recipe(run.parent, **{"precision": "fp32"} | options)
    task = read_dataset(folder / "task")
    return retrain(recipe, genotype, task, run, fold=fold, **arguments)


def skipping() -> Genotype:
    """Return the tiny genotype with one of its skips switched off."""
    tiny = tiny_genotype()
    (first, *others), operations = tiny.edge_active, tiny.edge_operation[0]
    edge = next(n for n, (active, op) in enumerate(zip(first, operations, strict=True)) if active and op == 0)
    less = tuple(0 if n == edge else active for n, active in enumerate(first))
    return parse_genotype(tiny.model_copy(update={"edge_active": (less, *others)}).to_json())


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, labels and an opinion, in float64."""
    torch.manual_seed(0)
    logits = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    label = torch.randint(3, (2, 1, 5, 4, 6))
    return logits, label, torch.randn(SHAPE, dtype=torch.float64).softmax(dim=1)


def one_hot(label: torch.Tensor) -> torch.Tensor:
    """Return class probabilities of 0 and 1."""
    return functional.one_hot(label[:, 0], 3).movedim(-1, 1).double()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_target_is_so_much_opinion_and_the_rest_label(share: float) -> None:
    logits, label, opinion = drawn()
    target = (1 - share) * one_hot(label) + share * opinion
    p = logits.softmax(dim=1)
    dims, common = (0, 2, 3, 4), (p + target - (p - target).abs()) / 2
    dice = 1 - (2 * common.sum(dims) + 1e-5) / (p.sum(dims) + target.sum(dims) + 1e-5)
    expected = dice[1:].mean() + functional.cross_entropy(logits, target)
    loss = segmentation_loss(logits, label, opinion=opinion, share=share)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_loss_is_least_where_the_network_agrees_with_its_teachers() -> None:
    _, label, opinion = drawn()

    def loss(weight: float) -> float:
        other = torch.full_like(opinion, 1 / 3)
        logits = torch.lerp(opinion, other, abs(weight)).log() * (1 + max(0.0, -weight))  # softer, or harder
        return segmentation_loss(logits, label, opinion=opinion, share=1.0).item()

    assert all(loss(0) < loss(weight) for weight in (-0.5, -0.1, -0.01, 0.01, 0.1, 0.5))


def test_an_opinion_that_is_the_label_changes_nothing() -> None:
    logits, label, _ = drawn()
    plain = segmentation_loss(logits, label)
    (gradient,) = torch.autograd.grad(plain, logits)
    taught = segmentation_loss(logits, label, opinion=one_hot(label), share=0.7)
    assert taught.item() == pytest.approx(plain.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(taught, logits)[0], gradient)


def test_teachers_give_the_mean_of_their_probabilities_and_keep_no_gradient() -> None:
    torch.manual_seed(0)
    networks = tuple(nn.Conv3d(1, 3, 1) for _ in range(3))
    image = torch.randn(2, 1, 4, 5, 3)
    opinion = Teachers(networks, share=1.0).opinion(image)
    assert opinion is not None
    expected = sum(network(image).softmax(dim=1) for network in networks) / 3
    torch.testing.assert_close(opinion, expected.detach())
    assert not opinion.requires_grad
    assert Teachers().opinion(image) is None


def test_a_network_that_learns_from_its_teacher_alone_comes_to_agree_with_it_whatever_the_labels() -> None:
    torch.manual_seed(0)
    teacher = nn.Conv3d(1, 3, 1)
    image = torch.randn(2, 1, 6, 6, 6)
    results = []
    for label in (torch.zeros(2, 1, 6, 6, 6), torch.full((2, 1, 6, 6, 6), 2)):
        torch.manual_seed(1)
        settings = Retraining(steps=200, warmup_steps=0, learning_rate=0.1, precision="fp32", weight_decay=0)
        state = start(nn.Conv3d(1, 3, 1), settings)
        for _ in range(settings.steps):
            train_step(state, image, label, settings, teachers=Teachers((teacher,), share=1.0))
        results.append(state.network(image).argmax(dim=1))
        agreed = (results[-1] == teacher(image).argmax(dim=1)).float().mean()
        assert agreed > 0.9
    assert torch.equal(*results)


def test_a_run_begins_with_the_weights_it_is_given(school: Path, tmp_path: Path) -> None:
    weights = learn(school, tmp_path / "run", origin=school / "a", steps=1, learning_rate=1e-12)
    found, first = load_file(weights), load_file(school / "a" / "weights.safetensors")
    for name, tensor in first.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)


def test_a_taught_run_that_stops_goes_on_to_the_same_weights_and_only_with_the_same_teachers(
    school: Path, tmp_path: Path
) -> None:
    taught: dict[str, Any] = {"origin": school / "a", "teachers": [school / "a", school / "b"]}
    whole = learn(school, tmp_path / "whole", **taught)

    def stop(step: int, loss: float, rate: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(school, tmp_path / "stopped", report=stop, **taught)
    others: tuple[dict[str, Any], ...] = ({}, {"origin": school / "a"}, taught | {"origin": school / "b"})
    for other in others:
        with pytest.raises(DatasetError) as caught:
            learn(school, tmp_path / "stopped", resume=True, **other)
        assert caught.value.code == "run-mismatch"
    again = learn(school, tmp_path / "stopped", resume=True, **taught)
    assert again.read_bytes() == whole.read_bytes()
    assert whole.read_bytes() != learn(school, tmp_path / "alone", origin=school / "a").read_bytes()
    assert len(read_config(tmp_path / "whole").teachers) == 2


def taught_by(run: Path, use: str) -> dict[str, Any]:
    """Return how a run is built on another."""
    return {use: run if use == "origin" else [run]}


@pytest.mark.parametrize("use", ["origin", "teachers"])
def test_a_run_that_cannot_teach_is_refused_and_leaves_no_folder(school: Path, tmp_path: Path, use: str) -> None:
    unfinished = Path(shutil.copytree(school / "a", tmp_path / "unfinished"))
    (unfinished / "weights.safetensors").unlink()
    renamed = Path(shutil.copytree(school / "a", tmp_path / "renamed"))
    text = (renamed / "config.toml").read_text()
    (renamed / "config.toml").write_text(text.replace('name = "Part 1"', 'name = "Another part"'))
    swapped = Path(shutil.copytree(school / "a", tmp_path / "swapped"))
    (swapped / "config.toml").write_text(text.replace('name = "MR"', 'name = "T2"'))
    refusals = [(school / "other-fold", "cases-seen"), (unfinished, "checkpoint-invalid"), (renamed, "run-mismatch")]
    refusals.append((swapped, "run-mismatch"))
    if use == "origin":
        refusals += [(school / "wide", "run-mismatch"), (school / "other-network", "run-mismatch")]
    for other, code in refusals:
        with pytest.raises(DatasetError) as caught:
            learn(school, tmp_path / "run", **taught_by(other, use))
        assert caught.value.code == code
        assert other.name in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_a_wider_network_teaches_a_narrow_one_and_more_so_with_a_greater_share(school: Path, tmp_path: Path) -> None:
    alone = load_file(school / "a" / "weights.safetensors")

    def moved(share: float) -> float:
        """Return how far a teacher takes the weights of a run that is else the same."""
        options: dict[str, Any] = {"teachers": [school / "wide"], "teaching": share}
        taught = load_file(learn(school, tmp_path / f"run-{share}", **options))
        return sum(float((taught[name] - tensor).square().sum()) for name, tensor in alone.items())

    assert 0 < moved(1e-6) < 0.01 * moved(0.9)


def test_a_case_held_out_of_a_training_is_held_out_of_its_teachers_too(school: Path, tmp_path: Path) -> None:
    known = next(iter(read_config(school / "a").cases))
    with pytest.raises(DatasetError) as caught:
        learn(school, tmp_path / "run", teachers=[school / "a"], without={known})
    assert caught.value.code == "cases-seen"
    assert known in str(caught.value)


def test_an_entry_that_learned_from_strangers_knows_their_cases(school: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "task", seed=1)
    renamed = read_config(learn(tmp_path, tmp_path / "strangers").parent)
    other = {f"other-{case}": digest for case, digest in renamed.cases.items()}
    text = renamed.model_copy(update={"cases": other}).model_dump(mode="json", exclude_none=True)
    (tmp_path / "strangers" / "config.toml").write_text(tomli_w.dumps(text))
    taught = read_config(learn(school, tmp_path / "run", teachers=[tmp_path / "strangers"]).parent)
    again = read_config(learn(school, tmp_path / "again", teachers=[school / "a", tmp_path / "run"]).parent)
    for config in (taught, again):
        assert config.known == other
        training = entry_of([config], "taught").training
        assert training is not None
        assert training.cases == config.cases | other
    assert read_config(school / "a").all_cases == read_config(school / "a").cases


def test_strangers_of_the_same_name_are_kept_apart(school: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "task", seed=2)
    learn(tmp_path, tmp_path / "strangers")
    taught = read_config(learn(school, tmp_path / "run", teachers=[tmp_path / "strangers"]).parent)
    theirs = read_config(tmp_path / "strangers").cases
    assert set(taught.known.values()) == set(theirs.values())
    assert not set(taught.known) & set(taught.cases)


def test_teachers_without_a_share_are_refused(school: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        learn(school, tmp_path / "run", teachers=[school / "a"], teaching=0.0)
    assert caught.value.code == "recipe-invalid"
