"""What the profile counts is what was published; what it measures is what a training step takes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from dints_search.cost import Setting, count_saved
from dints_search.genotype import Genotype, read_genotype
from dints_search.profile import MIB, build, count, measure, median_forward
from dints_search.space import SearchSpace, sample_genotype
from tests.tiny_entry import run_cli

ZOO = Path(__file__).parents[2] / "zoo"
CVPR = read_genotype(ZOO / "dints-cvpr2021-pancreas" / "genotype.json")
TUTORIAL = read_genotype(ZOO / "dints-tutorial-sigma0.2" / "genotype.json")


def published(width: float) -> Setting:
    return Setting(SearchSpace(), (96, 96, 96), in_channels=1, num_classes=3, channel_multiplier=width)


def test_both_forms_of_the_paper_network_are_counted() -> None:
    found = count(CVPR, published(1.0))
    assert (found.compatible_parameters, round(found.compatible_gmac, 2)) == (152_361_027, 334.38)
    assert (found.parameters, round(found.gmac, 2)) == (148_813_635, 333.61)


@pytest.mark.parametrize(("genotype", "width", "mib"), [(CVPR, 1.0, 3650), (CVPR, 0.5, 1827), (TUTORIAL, 1.0, 1115)])
def test_saved_activations_are_those_measured_of_the_reference(genotype: Genotype, width: float, mib: float) -> None:
    """The reference keeps what its idle stems compute, too."""
    with torch.device("meta"):
        network = build(genotype, published(width), compatible=True)
    assert count_saved(network, (1, 1, 96, 96, 96)) / MIB == pytest.approx(mib, rel=0.01)


def test_a_genotype_is_counted_in_its_own_space_and_order() -> None:
    genotype = sample_genotype(SearchSpace(2, 3), random.Random(0)).model_copy(update={"up": "conv_first"})
    setting = Setting(SearchSpace(), (16, 32, 16), in_channels=2, num_classes=4, channel_multiplier=0.125, batch=2)
    found = count(genotype, setting)
    with torch.device("meta"):
        network = build(genotype, setting)
    assert found.saved_mib == count_saved(network, (2, 2, 16, 32, 16)) / MIB
    assert found.gmac < count(genotype.model_copy(update={"up": "reference"}), setting).gmac


def test_a_measured_step_holds_weights_gradients_moments_and_activations() -> None:
    genotype = sample_genotype(SearchSpace(2, 2), random.Random(1))
    setting = Setting(SearchSpace(2, 2), (64, 64, 64), in_channels=1, num_classes=2, channel_multiplier=0.5)
    counted, measured = count(genotype, setting), measure(genotype, setting, repeats=1)
    least = counted.saved_mib + 4 * 4 * counted.parameters / MIB
    assert 0.9 * least < measured.step_mib < 4 * least + 300
    assert measured.forward_s > 0


def test_the_time_is_the_median_without_the_first_pass() -> None:
    ticks = iter([0.0, 100.0, 100.0, 101.0, 101.0, 151.0, 151.0, 153.0])
    network = torch.nn.Identity()
    assert median_forward(network, torch.zeros(1), repeats=3, clock=lambda: next(ticks)) == 2.0


def test_the_command_prints_one_table_for_several_networks(tmp_path: Path) -> None:
    path = tmp_path / "genotype.json"
    path.write_text(sample_genotype(SearchSpace(2, 2), random.Random(0)).to_json(), encoding="utf-8")
    words = ("search", "profile", path, "dints-tutorial-sigma0.2", "--size", "32,32,32", "--width", 0.125)
    said = run_cli(*words, "--repeats", 0, "--json")
    assert said.code == 0
    small, tutorial = json.loads(said.out)["networks"]
    assert tutorial["name"] == "dints-tutorial-sigma0.2"
    assert tutorial["digest"] == TUTORIAL.digest()
    assert small["parameters"] < tutorial["parameters"] < tutorial["compatible_parameters"]
    table = run_cli(*words, "--repeats", 0).out
    assert f"{tutorial['parameters'] / 1e6:.2f}" in table


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("none", "--size", "96,96,96"), "expected the name of a zoo entry"),
        (("missing.json",), "expected a genotype file"),
        (("dints-tutorial-sigma0.2", "--size", "96,96"), "expected --size I,J,K"),
        (("dints-tutorial-sigma0.2", "--size", "90,96,96"), "expected --size of multiples of 16"),
    ],
)
def test_what_cannot_be_profiled_is_refused(words: tuple[str, ...], expected: str) -> None:
    said = run_cli("search", "profile", *words, "--repeats", 0)
    assert said.code in (1, 2)
    assert expected in said.err
