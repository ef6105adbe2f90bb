"""Engines and precisions per window, with the floor beside them: multiplications over the peak of a matrix product.

    python -m benchmarks.engines [--entry hippocampus] [--device cpu] [--rounds 9] [--threads N]
    python -m benchmarks.engines --genotype zoo/dints-cvpr2021-pancreas/genotype.json --width 0.6875 --rounds 5

Contenders alternate; medians count. With --genotype the network is an untrained DiNTS network of that width, exported
by torch, and precision is measured on its noise. Prints a table and writes benchmarks/results/engines.json, or
engines_<folder of the genotype>.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.machine import write
from benchmarks.product import MATRIX_EDGE, matrix_seconds
from dints_deploy.catalog.catalog import load_entry
from dints_deploy.errors import DintsError
from dints_deploy.runtime.certificate import Target
from dints_deploy.runtime.engine import COMPUTES, available_threads, build_engine, installed
from dints_deploy.runtime.export import Proof, make_form, proofs_of
from dints_deploy.runtime.int8_forms import int8_forms
from dints_deploy.runtime.machine import cpu_features, describe_device
from dints_deploy.runtime.parity import run_windows

Window = tuple[int, int, int]
CLASSES = 3


def convolution_gmac(network: bytes) -> float:
    """Return the multiplications of a network's convolutions for one window, in 1e9."""
    model = onnx.load_from_string(network)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [max(1, dim.dim_value) for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.output)
    }
    weights = {weight.name: list(weight.dims) for weight in graph.initializer}
    products = (
        np.prod(shapes[node.output[0]][2:], dtype=float) * np.prod(weights[node.input[1]], dtype=float)
        for node in graph.node
        if node.op_type == "Conv"
    )
    return float(sum(products)) / 1e9


def untrained(genotype: Path, width: float, window: Window) -> Proof:
    """Return an untrained network with noise as its windows; its logits are ONNX Runtime's."""
    from dints_search.export import to_onnx
    from dints_search.genotype import read_genotype
    from dints_search.network import DiNTSNetwork

    network = DiNTSNetwork(read_genotype(genotype), in_channels=1, num_classes=CLASSES, channel_multiplier=width)
    exported = to_onnx(network, window)
    windows = np.random.default_rng(0).normal(size=(1, 1, *window)).astype(np.float32)
    session = build_engine("onnx", "cpu", available_threads()).open(
        exported, window=window, batch=1, precision="fp32", why="reference"
    )
    return Proof("model.onnx", exported, windows, run_windows(session, windows))


def contenders(proof: Proof, window: Window, device: str, threads: int) -> dict[str, tuple[Any, NDArray[Any]]]:
    """Return name -> (session, its logits on the windows) of every engine and precision that runs here."""
    names = ["onnx", "openvino"] if device == "cpu" else ["onnx", "onnx-trt", "tensorrt"]
    found: dict[str, tuple[Any, NDArray[Any]]] = {}
    for name in filter(installed, names):
        for precision in COMPUTES[name]:
            target = Target(engine=name, precision=precision, device=device)
            form = int8_forms(name, cpu_features())[0] if precision == "int8" else None
            try:
                made = make_form(proof, window, target, lambda stage, done, total: None, form)
                session = build_engine(name, device, threads).open(
                    made or proof.onnx, window=window, batch=1, precision=precision, why="a benchmark"
                )
                found[f"{name} {precision}"] = session, run_windows(session, proof.windows)
            except DintsError as error:
                print(f"{target} does not run here: {error}")
    return found


def main() -> None:
    """Run, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entry", default="hippocampus")
    parser.add_argument("--genotype", type=Path)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--window", default="96,96,96")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--matrix", type=int, default=MATRIX_EDGE, help="edge of the matrix product")
    given = parser.parse_args()
    if given.genotype:
        i, j, k = (int(n) for n in given.window.split(","))
        window: Window = (i, j, k)
        proof = untrained(given.genotype, given.width, window)
    else:
        entry = load_entry(given.entry)
        window = entry.spec.window
        [proof] = proofs_of(entry)[:1]
    measure(proof, window, given)


def measure(proof: Proof, window: Window, given: argparse.Namespace) -> None:
    """Let the contenders take turns and write what was measured."""
    running = contenders(proof, window, given.device, given.threads)
    product = matrix_seconds(given.matrix)
    seconds: dict[str, list[float]] = {"matrix product": [], **{name: [] for name in running}}
    for _ in range(given.rounds):
        seconds["matrix product"].append(product())
        for name, (session, _) in running.items():
            begin = time.perf_counter()
            session.result(session.submit(proof.windows[:1]))
            seconds[name].append(time.perf_counter() - begin)
    gmac, peak = convolution_gmac(proof.onnx), given.matrix**3 / min(seconds["matrix product"]) / 1e9
    median = {name: statistics.median(seconds[name]) for name in running}
    floor, reference = gmac / peak, median["onnx fp32"]
    labels = proof.logits.argmax(1)
    rows = [
        [
            name,
            f"{value:.3f}",
            f"{value / floor:.2f}",
            f"{reference / value:.2f}",
            f"{np.abs(running[name][1] - proof.logits).mean():.2g}",
            f"{float((running[name][1].argmax(1) != labels).mean()):.2e}",
        ]
        for name, value in sorted(median.items(), key=lambda item: item[1])
    ]
    columns = ["contender", "median s", "times the floor", "speed-up over onnx fp32", "mean logit error", "labels off"]
    for row in (columns, *rows):
        print("  ".join(text.rjust(14) for text in row))
    facts = {
        "window": "x".join(str(n) for n in window),
        "convolutions of a window": f"{gmac:.1f} GMAC",
        "peak of a float32 matrix product": f"{peak:.0f} GMAC/s for {given.matrix} rows and columns in numpy",
        "floor": f"{floor:.3f} s a window, in fp32; reduced precision may go below it",
        "int8": "the first form of each engine (docs/decisions/0025); export decides whether it is taken",
        "device": describe_device(given.device),
    }
    for key, value in facts.items():
        print(f"{key}: {value}")
    about = f"{given.genotype.parent.name}, untrained" if given.genotype else given.entry
    name = f"engines_{given.genotype.parent.name}" if given.genotype else "engines"
    title = f"Engines and precisions per window: {about}"
    table = {"columns": columns, "rows": rows}
    write(name, {"title": title, "rounds": given.rounds, "seconds": seconds, "tables": [table], "facts": facts})


if __name__ == "__main__":
    main()
