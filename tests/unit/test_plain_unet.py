"""The plain U-Net that an entry is compared with is one, and the comparison is that of the cases."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.plain_unet import FILTERS, compare, plain_unet
from dints_deploy.catalog.catalog import read_entry
from dints_deploy.runtime.evaluate import Evaluation
from dints_deploy.runtime.metrics import CaseScores, summarise

ZOO = Path(__file__).parents[2] / "zoo"


def test_the_unet_works_at_full_resolution_and_gives_a_logit_for_every_voxel() -> None:
    network = plain_unet(1, 3)
    sizes: list[tuple[int, ...]] = []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv3d) and module.kernel_size == (3, 3, 3):
            module.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, 40, 56, 40)).shape == (1, 3, 40, 56, 40)
    assert sizes.count((FILTERS[0], 40, 56, 40)) == 4  # two before the first halving, two after the last doubling


def test_the_difference_is_that_of_the_cases_means_in_their_order() -> None:
    scores = {f"case_{n}": CaseScores({1: 0.8 + n / 100, 2: 0.9}, {1: 0.9, 2: None}) for n in range(5)}
    label = {"1": {"dice": 0.9}, "2": {"dice": 0.9}}
    entry = {"cases": dict.fromkeys(reversed(scores), label), "summary": {"mean": {"dice": 0.9, "nsd": 0.95}}}
    table = compare(Evaluation(scores, summarise(scores)), read_entry(ZOO / "hippocampus"), entry, 1_400_000, 7)
    (_, _, _, said), (name, dice, _, _) = table["rows"]
    assert (name, dice) == ("plain U-Net, 1.40 M, 7 steps", "0.8600")
    mean, low, high = (float(number) for number in re.findall(r"[+-]0\.\d+", said))
    assert mean == pytest.approx(0.04)
    assert 0.03 <= low < mean < high <= 0.05
    assert said.endswith("better")
