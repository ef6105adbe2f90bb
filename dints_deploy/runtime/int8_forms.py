"""Which INT8 forms of a network there are for an engine: docs/decisions/0025-forms-of-int8.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from dints_deploy.runtime.machine import VNNI_FEATURES


@dataclass(frozen=True)
class Int8Form:
    """How a network becomes INT8.

    Attributes:
        ends: convolutions that stay in floating point, from the input and from the output.
        outputs: what a convolution returns becomes int8, too, and not only what it reads.
        biases: they become INT32.
        unsigned: activations are unsigned, which leaves a digit more to what comes out of a ReLU; else symmetric.
        plain_norms: norms that are written as partial sums become one operator.
    """

    ends: tuple[int, int]
    outputs: bool = False
    biases: bool = False
    unsigned: bool = False
    plain_norms: bool = False


QUICK, CAREFUL = (1, 1), (3, 3)

FORMS: Final[Mapping[str, tuple[Int8Form, ...]]] = MappingProxyType(
    {
        "openvino": tuple(Int8Form(ends, unsigned=True, plain_norms=True) for ends in (QUICK, CAREFUL)),
        "onnx": (Int8Form(CAREFUL, outputs=True, biases=True),),  # it computes in int8 only between int8 and int8
        "onnx-trt": (Int8Form(CAREFUL, outputs=True),),
        "tensorrt": (Int8Form(CAREFUL, outputs=True),),
    }
)
"""Engine -> forms, the quickest first: the first that keeps an entry's limits is taken."""


def int8_forms(engine: str, features: Iterable[str]) -> tuple[Int8Form, ...]:
    """Return an engine's forms on a processor with these `cpu_features`: unsigned only with `VNNI_FEATURES`."""
    if VNNI_FEATURES.isdisjoint(features):
        return tuple(replace(form, unsigned=False) for form in FORMS[engine])
    return FORMS[engine]
