"""Tiny networks with a numpy twin, whole zoo entries around them, and the command line to run them with."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tomli_w
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from scipy.ndimage import correlate
from typer.testing import CliRunner

from dints_deploy.catalog.weights import SUMS_FILE, write_sums
from dints_deploy.cli.main import app
from dints_deploy.errors import EngineError
from dints_deploy.imaging.nifti import write_nifti
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.engine import Batch, Handle, SessionInfo, check_precision

Fields = dict[str, Any]
Array = NDArray[Any]
Layer = tuple[Array, Array]
"""Weights (O, C, i, j, k) and bias (O,)."""

WINDOW = (8, 6, 10)


@dataclass(frozen=True, eq=False)
class TinyNetwork:
    """Convolutions with ReLU in between: in numpy by scipy's correlation in double precision, and as ONNX."""

    layers: tuple[Layer, ...]

    def logits(self, batch: Array) -> NDArray[np.float64]:
        """Return the logits (N, classes, I, J, K) of a batch (N, C, I, J, K)."""
        values = np.asarray(batch, np.float64)
        for number, (weight, bias) in enumerate(self.layers):
            values = _convolve(np.maximum(values, 0) if number else values, weight, bias)
        return values

    def onnx(self) -> bytes:
        """Return the ONNX file, for any batch and window."""
        nodes, weights, name = [], [], "scan"
        for number, (weight, bias) in enumerate(self.layers):
            if number:
                nodes.append(helper.make_node("Relu", [name], [f"relu{number}"]))
                name = f"relu{number}"
            weights += [tensor(f"weight{number}", weight), tensor(f"bias{number}", bias)]
            out = "logits" if number == len(self.layers) - 1 else f"conv{number}"
            pads = [n // 2 for n in weight.shape[2:]] * 2
            nodes.append(helper.make_node("Conv", [name, f"weight{number}", f"bias{number}"], [out], pads=pads))
            name = out
        return model(nodes, weights, self.layers[0][0].shape[1], self.layers[-1][0].shape[0])


def random_network(seed: int, *, channels: int = 1, classes: int = 3) -> TinyNetwork:
    """Return a 3x3x3 convolution to four features and a 1x1x1 convolution to classes; mirrored, it differs."""
    rng = np.random.default_rng(seed)
    shapes = [(4, channels, 3, 3, 3), (classes, 4, 1, 1, 1)]
    return TinyNetwork(
        tuple((rng.normal(size=s).astype(np.float32), rng.normal(size=s[0]).astype(np.float32)) for s in shapes)
    )


def threshold_network(threshold: float) -> TinyNetwork:
    """Return a network whose label is 1 exactly where its input is above the threshold."""
    weight = np.array([0, 1], np.float32).reshape(2, 1, 1, 1, 1)
    return TinyNetwork(((weight, np.array([0, -threshold], np.float32)),))


def tensor(name: str, values: Array) -> Any:
    """Return an ONNX tensor with its data inside."""
    return numpy_helper.from_array(np.ascontiguousarray(values), name)


def model(nodes: Sequence[Any], weights: Sequence[Any], channels: int, classes: int, **extra: Any) -> bytes:
    """Return an ONNX file with input `scan` and output `logits`; `extra` goes to `make_model`."""
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info("scan", TensorProto.FLOAT, ["n", channels, "i", "j", "k"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", classes, "i", "j", "k"])],
        initializer=list(weights),
    )
    settings = {"opset_imports": [helper.make_opsetid("", 20)], "ir_version": 10, **extra}
    data: bytes = helper.make_model(graph, **settings).SerializeToString()
    return data


def outside(network: bytes) -> bytes:
    """Return the ONNX file with its first tensor moved to a file of its own."""
    changed = onnx.load_from_string(network)
    first = changed.graph.initializer[0]
    first.ClearField("raw_data")
    first.data_location = TensorProto.EXTERNAL
    first.external_data.add(key="location", value="weights.bin")
    data: bytes = changed.SerializeToString()
    return data


def customised(network: bytes, domain: str = "com.example") -> bytes:
    """Return the ONNX file with its first node in a custom domain."""
    changed = onnx.load_from_string(network)
    changed.graph.node[0].domain = domain
    changed.opset_import.add(domain=domain, version=1)
    data: bytes = changed.SerializeToString()
    return data


class NumpyEngine:
    """A fake engine: reads a TinyNetwork from its ONNX file and computes it in numpy when the result is asked for."""

    name = "numpy"

    def open(
        self, network: bytes, *, window: Sequence[int], batch: int, precision: str, why: str = "asked for"
    ) -> NumpySession:
        """Load a TinyNetwork; raise `EngineError` for anything else."""
        check_precision(self.name, precision)
        try:
            weights = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(network).graph.initializer}
            layers = [(weights[f"weight{n}"], weights[f"bias{n}"]) for n in range(len(weights) // 2)]
        except Exception as fault:  # protobuf's exceptions depend on its implementation
            raise EngineError("engine-failed", f"expected a tiny network, found: {fault}") from fault
        if not layers:
            raise EngineError("engine-failed", "expected a tiny network, found none")
        return NumpySession(TinyNetwork(tuple(layers)), SessionInfo(self.name, np.__version__, "cpu", precision, why))


class NumpySession:
    """A loaded tiny network."""

    under_way = 2

    def __init__(self, network: TinyNetwork, info: SessionInfo) -> None:
        self._network = network
        self.info = info

    def submit(self, batch: Batch) -> Handle:
        """Keep a copy of the batch: what the caller does to it afterwards must not matter."""
        return batch.copy()

    def result(self, handle: Handle) -> Batch:
        """Compute now."""
        return self._network.logits(handle).astype(np.float32)

    def memory_bytes(self) -> int:
        """Nothing lies on a device."""
        return 0


def entry_fields(name: str = "tiny", *, classes: int = 3, ensemble: int = 1, **changes: Any) -> Fields:
    """Return what `entry.toml` says of an entry whose networks take one channel as it is, in windows of WINDOW."""
    files = ["model.onnx"] if ensemble == 1 else [f"model{n}.onnx" for n in range(ensemble)]
    fields: Fields = {
        "schema_version": 1,
        "name": name,
        "version": "1.2.3",
        "title": "Tiny",
        "intended_use": "Tests.",
        "licence": "CC0-1.0",
        "members": [{"onnx": file} for file in files],
        "channels": [{"name": "MR", "modality": "MR", "intensity": {"scheme": "identity"}}],
        "labels": [label_fields(value) for value in range(1, classes)],
        "window": list(WINDOW),
        "accepts": {
            "modality": ["MR"],
            "extent_min": [1, 1, 1],
            "extent_max": [500, 500, 500],
            "spacing_min": [0.1, 0.1, 0.1],
            "spacing_max": [10, 10, 10],
        },
    }
    return fields | changes


def label_fields(value: int) -> Fields:
    """Return one label of an entry."""
    return {
        "value": value,
        "id": f"part-{value}",
        "name": f"Part {value}",
        "colour": [40 * value % 256, 200, 30],
        "category": {"value": "91723000", "scheme": "SCT", "meaning": "Anatomical Structure"},
        "type": {"value": f"P{value}", "scheme": "99TINY", "meaning": f"Part {value}"},
        "nsd_tolerance": 1.0,
    }


def write_entry(
    folder: Path, fields: Fields, networks: Sequence[bytes] = (), *, extra: Mapping[str, bytes] | None = None
) -> Path:
    """Write an entry's folder with correct checksums and return it."""
    folder.mkdir(parents=True)
    (folder / "entry.toml").write_text(tomli_w.dumps(fields), encoding="utf-8")
    for member, network in zip(fields["members"], networks, strict=False):
        (folder / member["onnx"]).write_bytes(network)
    for name, data in (extra or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return sign(folder)


def sign(folder: Path) -> Path:
    """Bring SHA256SUMS up to date and return the folder."""
    (folder / SUMS_FILE).write_text(write_sums(folder), encoding="utf-8")
    return folder


def random_scan(seed: int = 0, shape: tuple[int, int, int] = WINDOW, *, channels: int = 1) -> Volume:
    """Return a scan of noise, 1 mm, upright in RAS."""
    data = np.random.default_rng(seed).normal(size=(channels, *shape)).astype(np.float32)
    return Volume(data, np.eye(4))


def scan_file(folder: Path, scan: Volume, name: str = "scan.nii.gz") -> Path:
    """Write a scan into a folder, which is made if need be, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_nifti(folder / name, scan)
    return folder / name


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let no file of this process grow beyond `limit` bytes: what a full disk does, wherever the files go."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass(frozen=True)
class Said:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


def run_cli(*words: object) -> Said:
    """Run the command line inside this process; an exception that is no exit of the program is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Said(result.exit_code, result.stdout, result.stderr)


def _convolve(values: Array, weight: Array, bias: Array) -> NDArray[np.float64]:
    """Return the zero-padded cross-correlation (N, O, I, J, K) of (N, C, I, J, K)."""
    out = np.zeros((len(values), len(weight), *values.shape[2:]))
    for n, o, c in np.ndindex(len(values), *weight.shape[:2]):
        out[n, o] += correlate(values[n, c], weight[o, c].astype(np.float64), mode="constant")
    return out + bias.reshape(-1, 1, 1, 1)
