"""What a genotype's network costs, as the paper's Table 1 has it: parameters, work, training memory, and time.

Parameters, multiply-adds and saved activations are counted; the peak memory of a training step and the time of a
forward pass are measured on this machine, in a process of their own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from dints_deploy.errors import EngineError
from dints_search.cost import Setting, count_saved
from dints_search.genotype import Genotype
from dints_search.network import DiNTSNetwork, count_gmac, count_parameters

MIB: Final = 2**20


@dataclass(frozen=True)
class Counts:
    """What can be counted without running the network.

    Attributes:
        parameters, gmac: of the network as deployed, for one window.
        compatible_parameters, compatible_gmac: of the published form, which owns and computes the idle stems too.
        saved_mib: activations that autograd keeps from the forward to the backward pass, fp32, the weights left aside.
    """

    parameters: int
    gmac: float
    compatible_parameters: int
    compatible_gmac: float
    saved_mib: float


@dataclass(frozen=True)
class Measured:
    """What one machine measured.

    Attributes:
        step_mib: peak memory of a training step over the process's own: weights, gradients, AdamW's moments,
            activations, working memory of the convolutions.
        forward_s: median seconds of a forward pass without gradients.
    """

    step_mib: float
    forward_s: float


def count(genotype: Genotype, setting: Setting) -> Counts:
    """Count a genotype's network for the setting's window, channels and width; space and `up` are the genotype's."""
    batch = setting.batch
    with torch.device("meta"):
        deployed, published = (build(genotype, setting, compatible=all_stems) for all_stems in (False, True))
    return Counts(
        count_parameters(deployed),
        batch * count_gmac(deployed, setting.size),
        count_parameters(published),
        batch * count_gmac(published, setting.size),
        count_saved(deployed, (batch, setting.in_channels, *setting.size)) / MIB,
    )


def build(genotype: Genotype, setting: Setting, *, compatible: bool = False) -> DiNTSNetwork:
    """Return the genotype's network."""
    return DiNTSNetwork(
        genotype,
        in_channels=setting.in_channels,
        num_classes=setting.num_classes,
        channel_multiplier=setting.channel_multiplier,
        compatible=compatible,
    )


def measure(genotype: Genotype, setting: Setting, *, device: str = "cpu", repeats: int = 3) -> Measured:
    """Measure a genotype's network in fp32 with the present number of threads, in a process of its own.

    Args:
        device: cpu or cuda:N.
        repeats: forward passes that are timed, after one that is not.

    Raises:
        EngineError: `memory-limit` when the process was ended, as the system does where memory runs out.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would have this process's memory for its own
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        work = pool.submit(_measure_here, genotype, setting, device, repeats, torch.get_num_threads())
        try:
            return work.result()
        except RuntimeError as error:
            if not isinstance(error, BrokenProcessPool) and "memory" not in str(error):
                raise
            window = ",".join(str(n) for n in setting.size)
            raise EngineError(
                "memory-limit",
                f"expected room for a training step at {window}, the process was ended: choose a smaller --size or "
                "--width, or --repeats 0 to count only",
            ) from error


def _measure_here(genotype: Genotype, setting: Setting, device: str, repeats: int, threads: int) -> Measured:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    start = _forget_peak(device)
    network = build(genotype, setting).to(device)
    optimiser = torch.optim.AdamW(network.parameters())
    x = torch.randn((setting.batch, setting.in_channels, *setting.size), device=device)
    _train_step(network, optimiser, x)
    peak = _peak_mib(device)
    optimiser.zero_grad(set_to_none=True)
    return Measured(peak - start, median_forward(network, x, repeats=repeats))


def median_forward(
    network: nn.Module, x: torch.Tensor, *, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the median seconds of a forward pass without gradients, after one that is not counted."""
    network.eval()
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            _wait(x.device)
            begun = clock()
            network(x)
            _wait(x.device)
            seconds.append(clock() - begun)
    return statistics.median(seconds[1:])


def _train_step(network: DiNTSNetwork, optimiser: torch.optim.Optimizer, x: torch.Tensor) -> None:
    network.train()
    logits = network(x)
    label = torch.zeros((len(x), *x.shape[2:]), dtype=torch.long, device=x.device)
    loss = functional.cross_entropy(logits, label)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    _wait(x.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: str) -> float:
    """Start to watch the peak memory and return what is in use now, in MiB."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / MIB
    with contextlib.suppress(OSError):  # where it is forbidden, the start is the peak of the import
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak becomes the present size
    return _peak_mib(device)


def _peak_mib(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / MIB
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
