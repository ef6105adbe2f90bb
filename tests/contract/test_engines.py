"""One suite for every way of running a network: OpenVINO, ONNX Runtime, torch, and the numpy fake of the tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from dints_deploy.catalog.catalog import load_entry
from dints_deploy.errors import EngineError, UsageError
from dints_deploy.runtime.engine import COMPUTES, PRECISIONS, Engine, Session, check_output, choose_engine
from dints_deploy.runtime.machine import cpu_features
from dints_deploy.runtime.onnx_engine import OnnxEngine
from dints_deploy.runtime.openvino_engine import OpenVinoEngine
from dints_deploy.runtime.segment import segment
from dints_search.torch_engine import TorchSession
from tests.tiny_entry import (
    WINDOW,
    NumpyEngine,
    TinyNetwork,
    entry_fields,
    model,
    random_network,
    random_scan,
    tensor,
    write_entry,
)

ENGINES: dict[str, Callable[[], Engine]] = {
    "openvino": lambda: OpenVinoEngine(threads=1),
    "openvino, two windows side by side": lambda: OpenVinoEngine(threads=2, at_once=2),
    "onnx": lambda: OnnxEngine(threads=1),
    "numpy": NumpyEngine,
}
SESSIONS = [*ENGINES, "torch"]


def in_torch(network: TinyNetwork) -> nn.Module:
    """Return the same network as a torch module."""
    layers: list[nn.Module] = []
    for weight, bias in network.layers:
        layer = nn.Conv3d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
        layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def opened(name: str, network: TinyNetwork, *, batch: int = 1, window: tuple[int, ...] = WINDOW) -> Session:
    """Return a session of a way of running networks."""
    if name == "torch":
        return TorchSession(in_torch(network))
    return ENGINES[name]().open(network.onnx(), window=window, batch=batch, precision="fp32", why="a test")


def windows(count: int, *, channels: int = 1, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, channels, *WINDOW)).astype(np.float32)


@pytest.mark.parametrize("name", SESSIONS)
@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (3, 5)])
def test_logits_are_those_of_the_network_in_double_precision(name: str, channels: int, classes: int) -> None:
    network = random_network(1, channels=channels, classes=classes)
    session = opened(name, network)
    for window in windows(3, channels=channels):
        logits = session.result(session.submit(window[np.newaxis]))
        assert logits.dtype == np.float32
        expected = network.logits(window[np.newaxis])
        assert logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SESSIONS)
def test_a_batch_gives_what_its_windows_give_alone(name: str) -> None:
    network, batch = random_network(2), windows(3)
    together = opened(name, network, batch=3)
    alone = opened(name, network)
    apart = np.concatenate([alone.result(alone.submit(window[np.newaxis])) for window in batch])
    np.testing.assert_allclose(together.result(together.submit(batch)), apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SESSIONS)
def test_with_batches_under_way_each_handle_gives_its_own_result(name: str) -> None:
    network, several = random_network(3), windows(8)
    session = opened(name, network)
    expected = [network.logits(window[np.newaxis]) for window in several]
    found: list[Any] = []
    waiting = [session.submit(window[np.newaxis]) for window in several[: session.under_way - 1]]
    for window in several[session.under_way - 1 :]:
        waiting.append(session.submit(window[np.newaxis]))
        found.append(session.result(waiting.pop(0)))
    found += [session.result(handle) for handle in waiting]
    for logits, reference in zip(found, expected, strict=True):  # compared at the end: no result was overwritten
        np.testing.assert_allclose(logits, reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SESSIONS)
def test_what_happens_to_a_batch_after_it_was_submitted_does_not_matter(name: str) -> None:
    network, batch = random_network(4), windows(1)
    expected = network.logits(batch)
    session = opened(name, network)
    handle = session.submit(batch)
    batch[:] = 1e6
    np.testing.assert_allclose(session.result(handle), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_says_what_runs(name: str) -> None:
    session = opened(name, random_network(0))
    assert (session.info.engine, session.info.device, session.info.precision) == (name.split(",")[0], "cpu", "fp32")
    assert session.info.version.split(".")[0].isdigit()
    assert session.info.why
    assert session.memory_bytes() >= 0


def needs_digits() -> TinyNetwork:
    """Return a network whose logits bfloat16 cannot give: a small difference of two large, nearly equal terms."""
    weight = np.array([[1 + 2.0**-10], [1.0]], np.float32).reshape(2, 1, 1, 1, 1)
    difference = np.array([[1024.0, -1024.0], [0.0, 0.0]], np.float32).reshape(2, 2, 1, 1, 1)
    return TinyNetwork(((weight, np.zeros(2, np.float32)), (difference, np.zeros(2, np.float32))))


@pytest.mark.parametrize("name", SESSIONS)
def test_fp32_keeps_digits_that_bfloat16_loses(name: str) -> None:
    network, batch = needs_digits(), np.abs(windows(1)) + 0.5
    rounded = torch.from_numpy(network.layers[0][0]).bfloat16().float().numpy()
    in_bf16 = TinyNetwork(((rounded, network.layers[0][1]), network.layers[1])).logits(batch)
    expected = network.logits(batch)
    assert np.abs(in_bf16 - expected)[:, 0].min() > 0.4  # seen where it happens
    session = opened(name, network)
    np.testing.assert_allclose(session.result(session.submit(batch)), expected, rtol=1e-3, atol=1e-3)


def test_what_int8_leaves_alone_is_computed_as_bf16_where_the_processor_has_it() -> None:
    network, batch = needs_digits().onnx(), np.abs(windows(1)) + 0.5
    logits = {}
    for precision in ("int8", "bf16", "fp32"):  # nothing in this network is quantised
        session = OpenVinoEngine(threads=1).open(network, window=WINDOW, batch=1, precision=precision)
        logits[precision] = session.result(session.submit(batch))
    same = "bf16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_features()) else "fp32"
    np.testing.assert_array_equal(logits["int8"], logits[same])
    assert (logits["bf16"] != logits["fp32"]).any()


@pytest.mark.parametrize("name", ENGINES)
def test_a_precision_that_an_engine_does_not_have_is_a_wrong_call(name: str) -> None:
    for precision in {*PRECISIONS, "fp33"} - {*COMPUTES.get(ENGINES[name]().name, ("fp32",))}:
        with pytest.raises(UsageError) as caught:
            ENGINES[name]().open(random_network(0).onnx(), window=WINDOW, batch=1, precision=precision, why="")
        assert caught.value.code == "usage"
        assert precision in caught.value.message


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("engine", ["auto", "openvino", "onnx"])
def test_a_precision_without_certificate_is_refused(engine: str, precision: str, tmp_path: Path) -> None:
    write_entry(tmp_path / "tiny", entry_fields(), [random_network(0).onnx()])
    with pytest.raises((EngineError, UsageError)) as caught:
        segment(random_scan(), load_entry(tmp_path / "tiny"), engine=engine, precision=precision, threads=1)
    assert caught.value.code == ("usage" if (engine, precision) == ("onnx", "bf16") else "no-certificate")
    assert precision in caught.value.message


def without_input() -> bytes:
    """Return a network that looks at nothing."""
    constant = helper.make_node("Constant", [], ["logits"], value=tensor("c", np.zeros((1, 3, 8, 6, 10), np.float32)))
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3, 8, 6, 10])
    graph = helper.make_graph([constant], "blind", [], [out])
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return data


def with_two_outputs() -> bytes:
    """Return a network of which nobody knows which output is meant."""
    changed = onnx.load_from_string(WHOLE)
    changed.graph.output.append(helper.make_tensor_value_info("conv0", TensorProto.FLOAT, None))
    data: bytes = changed.SerializeToString()
    return data


def of_another_rank() -> bytes:
    """Return a network for a list of numbers."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "flat", [value], [out])
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return data


WHOLE = random_network(0).onnx()
UNUSABLE = {
    "cut": WHOLE[: len(WHOLE) // 2],
    "noise": bytes(range(256)),
    "empty": b"",
    "unknown operator": WHOLE.replace(b"Conv", b"Cnov"),
    "missing weights": WHOLE.replace(b"\x07weight1", b"\x07weight9", 1),
    "no input": without_input(),
    "two outputs": with_two_outputs(),
    "another rank": of_another_rank(),
    "other channels": random_network(0, channels=2).onnx(),
}


def open_and_run(engine: Engine, network: bytes) -> Any:
    session = engine.open(network, window=WINDOW, batch=1, precision="fp32", why="")
    return session.result(session.submit(windows(1)))


@pytest.mark.parametrize("damage", UNUSABLE)
@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_a_network_that_cannot_run_is_refused_in_one_line(name: str, damage: str) -> None:
    with pytest.raises(EngineError) as caught:
        open_and_run(ENGINES[name](), UNUSABLE[damage])
    assert caught.value.code == "engine-failed"
    assert "\n" not in caught.value.message.strip()
    assert len(caught.value.message) < 1000


def not_a_number() -> bytes:
    """Return a network whose logits are the square root of its negative input."""
    nodes = [helper.make_node("Sqrt", ["scan"], ["root"]), helper.make_node("Concat", ["root"] * 3, ["logits"], axis=1)]
    return model(nodes, [], 1, 3)


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_logits_that_are_no_numbers_make_no_mask(engine: str, tmp_path: Path) -> None:
    write_entry(tmp_path / "tiny", entry_fields(), [not_a_number()])
    with pytest.raises(EngineError) as caught:
        segment(random_scan(), load_entry(tmp_path / "tiny"), engine=engine, threads=1)
    assert caught.value.code == "engine-output"
    assert engine in caught.value.message


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_a_network_of_other_classes_than_the_entry_says_makes_no_mask(engine: str, tmp_path: Path) -> None:
    write_entry(tmp_path / "tiny", entry_fields(classes=4), [random_network(0, classes=3).onnx()])
    with pytest.raises(EngineError) as caught:
        segment(random_scan(), load_entry(tmp_path / "tiny"), engine=engine, threads=1)
    assert caught.value.code == "engine-output"
    assert "(1, 4, 8, 6, 10)" in caught.value.message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_enough_to_refuse(bad: float) -> None:
    logits = np.zeros((1, 3, 4, 4, 4), np.float32)
    assert check_output(logits, logits.shape, "e") is logits
    logits[0, 2, 3, 1, 0] = bad
    with pytest.raises(EngineError) as caught:
        check_output(logits, logits.shape, "e")
    assert caught.value.code == "engine-output"


def test_an_unknown_engine_or_device_is_a_wrong_call() -> None:
    wrong: list[dict[str, Any]] = [{"name": "tensorflow"}, {"name": "auto", "device": "gpu"}]
    wrong += [{"name": "onnx", "device": device} for device in ("cuda:", "cuda:x", "cuda:-1", "cuda:0x", "CPU", "")]
    wrong += [{"name": "openvino", "device": "cuda:0"}, {"name": "tensorrt"}, {"name": "onnx-trt", "device": "cpu"}]
    for call in wrong:
        with pytest.raises(UsageError) as caught:
            choose_engine(call.pop("name"), windows=1, **call)
        assert caught.value.code == "usage"


def test_a_cuda_device_without_cuda_is_named_as_missing_not_as_a_damaged_network() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is CUDA")
    engine, _ = choose_engine("onnx", windows=1, device="cuda:0")
    with pytest.raises(EngineError) as caught:
        engine.open(WHOLE, window=WINDOW, batch=1, precision="fp32", why="")
    assert caught.value.code == "engine-missing"


def test_auto_takes_the_quick_start_for_few_windows_and_the_fast_engine_for_many_and_says_why() -> None:
    few, why_few = choose_engine("auto", windows=1)
    many, why_many = choose_engine("auto", windows=1000)
    assert (few.name, many.name) == ("onnx", "openvino")
    assert "1 window" in why_few
    assert "1000 windows" in why_many
    assert choose_engine("onnx", windows=1000)[1] == "asked for"


SIGNALLED = """
import os, signal
from tests.contract.test_engines import ENGINES, WHOLE, WINDOW

sessions = []
for name in ["openvino", "onnx", "openvino", "openvino"]:
    sessions.append(ENGINES[name]().open(WHOLE, window=WINDOW, batch=1, precision="fp32", why=""))
while sessions:
    del sessions[0]
signal.signal(signal.SIGUSR1, lambda number, frame: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_is_handled_after_the_networks_of_an_ensemble_were_closed() -> None:
    """OpenVINO's cores left a freed signal stack behind: the next signal, such as Ctrl-C, killed the process."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


STARVED = """
import resource, sys
from pathlib import Path
import numpy as np
from dints_deploy.errors import EngineError
from tests.contract.test_engines import ENGINES, WHOLE, WINDOW

engine = ENGINES[sys.argv[1]]()
engine.open(WHOLE, window=WINDOW, batch=1, precision="fp32", why="what the libraries need is loaded")
large = (192, 192, 192)
batch = np.zeros((1, 1, *large), np.float32)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
try:
    session = engine.open(WHOLE, window=large, batch=1, precision="fp32", why="a test")
    session.result(session.submit(batch))
except EngineError as error:
    print(error.code, str(error).count(chr(10)))
small = engine.open(WHOLE, window=WINDOW, batch=1, precision="fp32", why="the process goes on")
print(small.result(small.submit(np.zeros((1, 1, *WINDOW), np.float32))).shape)
"""


@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_an_engine_that_runs_out_of_memory_says_so_and_the_process_lives(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARVED, name],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["engine-memory 0", "(1, 3, 8, 6, 10)"], done.stderr
