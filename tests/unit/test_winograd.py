"""Winograd's convolutions: the same sums of products, by fewer of them, in double precision and in an engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.nn import functional

from dints_deploy.runtime.openvino_winograd import with_fewer_products
from dints_deploy.runtime.winograd import TAPS, Form, choose_form, matrices, transform_weights
from tests.tiny_entry import TinyNetwork

TILES = (2, 3, 4)


@pytest.mark.parametrize("tile", TILES)
def test_a_tile_is_the_correlation_of_its_data_with_the_taps(tile: int) -> None:
    results, taps, data = matrices(tile)
    rng = np.random.default_rng(tile)
    d, g = rng.normal(size=tile + TAPS - 1), rng.normal(size=TAPS)
    assert_allclose(results @ ((taps @ g) * (data @ d)), np.correlate(d, g), rtol=1e-12, atol=1e-12)
    assert len(data) == tile + TAPS - 1  # so many products for 3 m


@pytest.mark.parametrize("axes", [(2,), (3,), (4,), (2, 3), (3, 4), (2, 4)])
def test_weights_are_transformed_along_each_axis_and_the_first_changes_fastest(axes: tuple[int, ...]) -> None:
    form = Form(axes, 4)
    shape = [3, 2, *(3 if axis in axes else 1 for axis in (2, 3, 4))]
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    parts = transform_weights(weight, form)
    assert parts.shape == (6 ** len(axes), 3, 2, 1, 1, 1)
    taps = matrices(4)[1]
    for p, q in itertools.product(range(6), repeat=2):
        if len(axes) == 1:
            expected = np.tensordot(weight.reshape(3, 2, 3), taps[p], 1)
            assert_allclose(parts[p].reshape(3, 2), expected, rtol=1e-5, atol=1e-6)
        else:
            expected = np.einsum("oiab,a,b->oi", weight.reshape(3, 2, 3, 3), taps[p], taps[q])
            assert_allclose(parts[q * 6 + p].reshape(3, 2), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "features", "form"),
    [
        ((512, 512, 3, 3, 3), (6, 6, 6), Form((2,), 3)),
        ((256, 256, 3, 3, 3), (12, 12, 12), Form((2, 3), 4)),
        ((256, 256, 3, 1, 3), (12, 12, 12), Form((2, 4), 4)),
        ((256, 256, 1, 1, 3), (12, 12, 12), Form((4,), 4)),
        ((128, 128, 3, 3, 3), (10, 10, 10), Form((2, 3), 2)),
        ((32, 32, 3, 3, 3), (96, 96, 96), Form((2,), 4, in_turn=True)),
        ((32, 32, 1, 3, 3), (96, 96, 96), None),  # tiles along j lie apart
        ((16, 32, 3, 3, 3), (96, 96, 96), None),  # too few channels
        ((256, 256, 1, 1, 1), (12, 12, 12), None),
        ((256, 256, 3, 3, 3), (11, 11, 11), None),
        ((256, 256, 3, 3, 3), (12, 11, 12), None),
    ],
)
def test_the_form_fits_the_kernel_and_the_features(weight: Sequence[int], features: Sequence[int], form: Any) -> None:
    assert choose_form(weight, (1, weight[1], *features)) == form
    assert choose_form(weight, (2, weight[1], *features)) is None


def in_torch(network: TinyNetwork, scan: Any) -> Any:
    """Return the logits in double precision."""
    values = torch.from_numpy(scan).double()
    for number, (weight, bias) in enumerate(network.layers):
        padding = [n // 2 for n in weight.shape[2:]]
        values = values.relu() if number else values
        values = functional.conv3d(
            values, torch.from_numpy(weight).double(), torch.from_numpy(bias).double(), padding=padding
        )
    return values.numpy()


def rewritten(network: TinyNetwork, scan: Any, *, least: float = 1) -> tuple[Any, float, list[str]]:
    """Return the logits in OpenVINO, the multiplications saved, and the kinds of the network's operators."""
    import openvino  # not before the engine, which keeps it from sending

    core = openvino.Core()
    model = core.read_model(network.onnx(), b"")
    model.reshape(list(scan.shape))
    saved = with_fewer_products(model, least=least)
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return compiled([scan])[0], saved, kinds


def network_of(kernel: Sequence[int], channels: int) -> TinyNetwork:
    """Return a convolution of this kernel between two that make its features and the logits."""
    rng = np.random.default_rng(channels)
    shapes = [(channels, 1, 3, 3, 3), (channels, channels, *kernel), (2, channels, 1, 1, 1)]
    scales = [np.sqrt(np.prod(shape[1:])) for shape in shapes]
    return TinyNetwork(
        tuple(
            ((rng.normal(size=s) / scale).astype(np.float32), rng.normal(size=s[0]).astype(np.float32))
            for s, scale in zip(shapes, scales, strict=True)
        )
    )


@pytest.mark.parametrize(
    ("kernel", "channels", "window", "ratio"),
    [
        ((3, 3, 3), 128, (6, 8, 7), 5 / 9),
        ((3, 3, 3), 128, (4, 6, 5), 1 / 2),  # one tile
        ((1, 3, 3), 128, (7, 8, 6), 1 / 2),
        ((3, 3, 3), 64, (12, 16, 10), 1 / 4),
        ((3, 1, 3), 64, (12, 9, 16), 1 / 4),
        ((1, 1, 3), 64, (9, 10, 12), 1 / 2),
        ((3, 3, 1), 64, (10, 14, 9), 4 / 9),
        ((3, 3, 3), 32, (36, 40, 34), 1 / 2),
        ((3, 1, 3), 32, (36, 33, 35), 1 / 2),
    ],
)
def test_a_rewritten_network_computes_what_it_did(
    kernel: tuple[int, ...], channels: int, window: tuple[int, ...], ratio: float
) -> None:
    network = network_of(kernel, channels)
    scan = np.random.default_rng(1).normal(size=(1, 1, *window)).astype(np.float32)
    logits, saved, kinds = rewritten(network, scan)
    assert saved == pytest.approx((1 - ratio) * channels**2 * np.prod(kernel) * np.prod(window))
    assert kinds.count("Convolution") > 3
    assert_allclose(logits, in_torch(network, scan), rtol=0, atol=3e-5)  # values of about 1


def test_what_gains_too_little_stays_as_it_is() -> None:
    network = network_of((3, 3, 3), 64)
    scan = np.zeros((1, 1, 12, 12, 12), np.float32)
    _, saved, kinds = rewritten(network, scan, least=1e9)
    assert saved == 0
    assert kinds.count("Convolution") == 3


def test_a_convolution_that_changes_the_size_or_is_dilated_stays_as_it_is() -> None:
    import openvino
    from openvino import opset13 as ops

    scan = ops.parameter([1, 64, 12, 12, 12], np.float32)
    weight = ops.constant(np.ones((64, 64, 3, 3, 3), np.float32))
    reads = ops.relu(scan)
    for strides, dilations, pads in (
        ([2] * 3, [1] * 3, [1] * 3),
        ([1] * 3, [2] * 3, [2] * 3),
        ([1] * 3, [1] * 3, [0] * 3),
    ):
        node = ops.convolution(reads, weight, strides, pads, pads, dilations)
        model = openvino.Model([node], [scan])
        assert with_fewer_products(model, least=1) == 0
        assert [n.get_type_name() for n in model.get_ordered_ops()].count("Convolution") == 1
