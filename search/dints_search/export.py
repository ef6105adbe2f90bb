"""Export a trained network to one ONNX file, and prove that the engines compute what torch computes.

The file is written by the dynamo exporter with its weights inside; nothing is written when parity fails.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from dints_deploy.catalog.dataset import Case, Dataset, read_case
from dints_deploy.catalog.entry import Entry
from dints_deploy.catalog.weights import check_onnx
from dints_deploy.errors import DatasetError
from dints_deploy.files import write_bytes, write_text
from dints_deploy.runtime.engine import Batch, choose_engine
from dints_deploy.runtime.export import Proof
from dints_deploy.runtime.parity import Certificate, Comparison, compare, hostile_windows, run_windows, within
from dints_deploy.runtime.preprocess import prepare
from dints_deploy.runtime.window import window_starts
from dints_search.evaluate import entry_of
from dints_search.network import DiNTSNetwork
from dints_search.run import trained_network
from dints_search.stable_norm import with_stable_norms
from dints_search.torch_engine import TorchSession

OPSET: Final = 20
PARITY_WINDOWS: Final = 3
"""Real windows kept in the entry: enough for parity and calibration, small enough to ship."""

CPU_ENGINES: Final = ("onnx", "openvino")


@dataclass(frozen=True, eq=False)
class Exported:
    """A network as ONNX with its proof.

    Attributes:
        onnx: the file's bytes.
        windows: real windows (N, C, I, J, K) float32.
        logits: torch's fp32 logits on them (N, classes, I, J, K).
        comparisons: one per engine, all within the limits.
    """

    onnx: bytes
    windows: Batch
    logits: Batch
    comparisons: tuple[Comparison, ...]

    @property
    def sha256(self) -> str:
        """Return the digest of the ONNX file."""
        return hashlib.sha256(self.onnx).hexdigest()


def to_onnx(network: DiNTSNetwork, window: tuple[int, int, int]) -> bytes:
    """Return the network as an ONNX file for one window size and any batch; input `scan`, output `logits`."""
    example = torch.zeros(2, network.in_channels, *window)
    program = torch.onnx.export(
        with_stable_norms(network, window),
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["scan"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        external_data=False,
        verbose=False,
    )
    if program is None:
        raise DatasetError("parity-failed", "expected torch to export the network, it returned nothing")
    model = program.model_proto
    for node in model.graph.node:
        node.ClearField("metadata_props")  # the exporter's stack traces name this machine's folders
    onnx: bytes = model.SerializeToString()
    check_onnx(onnx, "the exported network")
    return onnx


def real_windows(cases: tuple[Case, ...], spec: Entry, count: int) -> Batch:
    """Return the window around the middle of the labels of the first cases, (N, C, I, J, K).

    Raises:
        DatasetError: `run-mismatch` when there is no case, `case-invalid` for a bad one.
    """
    if not cases:
        raise DatasetError("run-mismatch", "expected the cases that the run was trained on, found none: check --data")
    names = {label.value: label.name for label in spec.labels}
    windows = []
    for case in cases[:count]:
        image, reference = read_case(case, names)
        prepared = prepare(image, spec.preparation)
        inside = np.argwhere(prepared.labels(reference))
        middle = inside.mean(axis=0) if len(inside) else np.array(prepared.grid.shape) / 2
        starts = np.array(window_starts(prepared.grid.shape, spec.window, spec.overlap))
        i, j, k = starts[np.abs(starts + np.array(spec.window) / 2 - middle).sum(axis=1).argmin()]
        wi, wj, wk = spec.window
        windows.append(prepared.data[:, i : i + wi, j : j + wj, k : k + wk])
    return np.stack(windows)


def export_network(network: DiNTSNetwork, spec: Entry, cases: tuple[Case, ...]) -> Exported:
    """Export a network and measure both CPU engines against torch on real and hostile windows.

    Raises:
        DatasetError: `parity-failed`, with the engine and its figures.
    """
    onnx = to_onnx(network, spec.window)
    digest = hashlib.sha256(onnx).hexdigest()
    windows = real_windows(cases, spec, PARITY_WINDOWS)
    hostile = hostile_windows(windows.shape[1:])
    torch_session = TorchSession(network)
    logits, hostile_logits = run_windows(torch_session, windows), run_windows(torch_session, hostile)
    comparisons = []
    for name in CPU_ENGINES:
        engine, _ = choose_engine(name, windows=PARITY_WINDOWS)
        session = engine.open(onnx, window=spec.window, batch=1, precision="fp32", why="parity")
        comparison = compare(session, spec, digest, real=(windows, logits), hostile=(hostile, hostile_logits))
        if not within(comparison, spec):
            raise DatasetError("parity-failed", f"expected {name} within {spec.parity}, found {comparison}")
        comparisons.append(comparison)
    return Exported(onnx, windows, logits, tuple(comparisons))


def certificate(exports: list[Exported]) -> str:
    """Return the text of `parity.json`."""
    comparisons = tuple(comparison for exported in exports for comparison in exported.comparisons)
    record = Certificate(schema_version=1, reference=f"torch {torch.__version__} fp32, cpu", comparisons=comparisons)
    return record.model_dump_json(indent=1) + "\n"


def export_run(run: Path, dataset: Dataset, folder: Path) -> list[Path]:
    """Write `model.onnx` and `parity.json` of a finished run."""
    config, network = trained_network(run)
    cases = tuple(case for case in dataset.cases if case.id in config.cases)
    exported = export_network(network, entry_of([config], "run"), cases)
    write_bytes(folder / "model.onnx", exported.onnx)
    write_text(folder / "parity.json", certificate([exported]))
    return [folder / "model.onnx", folder / "parity.json"]


def run_proof(run: Path, dataset: Dataset) -> tuple[Entry, Proof]:
    """Return what a finished run would publish, and its network with what other forms of it are proven with.

    Raises:
        DatasetError: `parity-failed` when the fp32 network itself is not what torch computes.
    """
    config, network = trained_network(run)
    cases = tuple(case for case in dataset.cases if case.id in config.cases)
    spec = entry_of([config], "run")
    exported = export_network(network, spec, cases)
    return spec, Proof("model.onnx", exported.onnx, exported.windows, exported.logits)
