"""One search step, weights then architecture, against MONAI's: time, peak memory, and where the time goes.

    python -m benchmarks.search_step --size 48,64,48 --width 0.25 --precision fp32

Both compute the same function on the same patches with the same optimisers, each in a process of its own so that its
peak memory is its own. `cpu` is processor time, which another program on the machine disturbs less than wall time. The
figures of each precision add up in benchmarks/results/search_step.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import DiNTS
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import read, write
from dints_search.cost import Setting, reference_memory
from dints_search.decode import decode
from dints_search.losses import architecture_loss
from dints_search.space import SearchSpace
from dints_search.supernet import Supernet
from tests.monai_oracle import monai_losses, monai_space

WHO = ("monai", "ours")
TITLE = "A search step against MONAI's"
CLASSES = 3
SIGMA = 0.5
MIB = 2**20
CONVOLUTIONS = ("aten::mkldnn_convolution", "aten::slow_conv3d_forward", "aten::convolution_backward")
CUDA_CONVOLUTIONS = ("aten::cudnn_convolution", "aten::convolution_backward")


@dataclass(frozen=True)
class Contestant:
    """A network with its architecture parameters, the loss of an architecture step, and a decoder."""

    network: nn.Module
    weights: list[nn.Parameter]
    architecture: list[nn.Parameter]
    loss: Callable[[Tensor], Tensor]
    decode: Callable[[], Any]


def ours(options: argparse.Namespace) -> Contestant:
    space = SearchSpace(options.blocks, options.depths)
    network = Supernet(
        space,
        in_channels=1,
        num_classes=CLASSES,
        channel_multiplier=options.width,
        checkpointing=options.checkpointing,
    )
    network.to(options.device)
    setting = Setting(space, options.size, in_channels=1, num_classes=CLASSES, channel_multiplier=options.width)
    cost = reference_memory(setting)
    parameters = network.architecture

    def loss(segmentation: Tensor) -> Tensor:
        settings: dict[str, Any] = {"progress": 0.5, "sigma": SIGMA, "cost": cost, "form": "reference"}
        return architecture_loss(parameters, segmentation, **settings).total

    architecture = list(parameters.parameters())
    return Contestant(network, network.weights(), architecture, loss, lambda: decode(parameters))


def monai(options: argparse.Namespace) -> Contestant:
    space = monai_space(SearchSpace(options.blocks, options.depths), channel_multiplier=options.width)
    if options.device != "cpu":
        raise SystemExit("MONAI's search space takes its device in the constructor: this benchmark runs it on a CPU")
    network = DiNTS(space, 1, CLASSES, use_downsample=True)
    architecture = [space.log_alpha_c, space.log_alpha_a]
    weights = [p for name, p in network.named_parameters() if "log_alpha" not in name]

    def loss(segmentation: Tensor) -> Tensor:
        found = monai_losses(space, options.size)
        memory = (found.usage - SIGMA).abs()
        return segmentation + 0.5 * (found.operations + found.patterns + 0.001 * found.topology + memory)

    return Contestant(network, weights, architecture, loss, space.decode)


class Stepper:
    """Do search steps of a contestant as the reference's search script does them."""

    def __init__(self, contestant: Contestant, options: argparse.Namespace) -> None:
        self.contestant, self.options = contestant, options
        generator = torch.Generator().manual_seed(0)
        shape = (options.batch, 1, *options.size)
        self.image = torch.randn(shape, generator=generator).to(options.device)
        self.label = torch.randint(0, CLASSES, shape, generator=generator).to(options.device)
        self.segmentation = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
        self.sgd = torch.optim.SGD(contestant.weights, lr=0.025, momentum=0.9, weight_decay=4e-5)
        self.adam = torch.optim.Adam(contestant.architecture, lr=0.001, betas=(0.5, 0.999))

    def step(self) -> None:
        self._half(self.sgd, self.contestant.weights, self.contestant.architecture, lambda loss: loss)
        self._half(self.adam, self.contestant.architecture, self.contestant.weights, self.contestant.loss)

    def _half(
        self,
        optimiser: torch.optim.Optimizer,
        learned: list[nn.Parameter],
        frozen: list[nn.Parameter],
        loss: Callable[[Tensor], Tensor],
    ) -> None:
        for p in learned:
            p.requires_grad_(True)
        for p in frozen:
            p.requires_grad_(False)
        mixed = self.options.precision == "bf16"
        with torch.autocast(self.options.device, torch.bfloat16) if mixed else nullcontext():
            logits = self.contestant.network(self.image)
        total = loss(self.segmentation(logits.float(), self.label))
        optimiser.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def timed(action: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Return the least wall and processor seconds."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"wall": min(walls), "cpu": min(cpus)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one contestant in this process."""
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    contestant = {"ours": ours, "monai": monai}[options.only](options)
    contestant.network.train()
    stepper = Stepper(contestant, options)
    stepper.step()
    result: dict[str, Any] = {"step": timed(stepper.step, options.repeats)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if options.device != "cpu":
        before, peak = 0.0, torch.cuda.max_memory_allocated() / MIB
    result |= {"before_mib": before, "peak_mib": peak, "step_mib": peak - before}
    for p in contestant.architecture:
        p.requires_grad_(True)
    zero = torch.zeros((), device=options.device)
    result["losses"] = timed(lambda: contestant.loss(zero).backward(), 5)  # type: ignore[no-untyped-call]
    if not options.skip_decode:
        result["decode"] = timed(contestant.decode, 1)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        stepper.step()
    events = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    everything = sum(events.values())
    wanted = CONVOLUTIONS if options.device == "cpu" else CUDA_CONVOLUTIONS
    result["convolutions_share"] = sum(events.get(name, 0.0) for name in wanted) / everything
    top = sorted(events.items(), key=lambda item: -item[1])[:8]
    result["where"] = {name: round(seconds / everything, 4) for name, seconds in top}
    return result


def compare(arguments: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure both, each in its own process."""
    results = {}
    for only in WHO:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.search_step", *arguments, "--only", only]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[only] = json.loads(output.splitlines()[-1])
    setting = {key: value for key, value in vars(options).items() if key != "only"}
    return {"setting": setting, "threads": torch.get_num_threads(), **results, "ratios": ratios(**results)}


def ratios(monai: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """Return what the figures of both come to."""
    a, b = monai, ours
    beside = b["losses"]["cpu"] + (b["decode"]["cpu"] if "decode" in b else 0.0)
    return {
        "speedup_cpu": a["step"]["cpu"] / b["step"]["cpu"],
        "speedup_wall": a["step"]["wall"] / b["step"]["wall"],
        "memory": b["step_mib"] / a["step_mib"],
        "over_convolutions": 1 / b["convolutions_share"],
        "losses_and_decoding_share": beside / b["step"]["cpu"],
    }


def rows_of(found: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return what was measured of both: a name, MONAI's figure, ours."""
    figures: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("step, CPU s", lambda r: r["step"]["cpu"]),
        ("step, wall s", lambda r: r["step"]["wall"]),
        ("peak memory, MiB", lambda r: r["peak_mib"]),
        ("  over the start, MiB", lambda r: r["step_mib"]),
        ("architecture losses, ms", lambda r: 1000 * r["losses"]["cpu"]),
        ("decoding, ms", lambda r: 1000 * r["decode"]["cpu"] if "decode" in r else float("nan")),
        ("convolutions, % of a step", lambda r: 100 * r["convolutions_share"]),
    ]
    return [(name, figure(found["monai"]), figure(found["ours"])) for name, figure in figures]


def table(found: dict[str, Any]) -> dict[str, Any]:
    """Return the table of one precision for the page, and above it where the time went."""
    setting, shares = found["setting"], found["ratios"]
    size = "x".join(str(n) for n in setting["size"])
    where = {who: ", ".join(f"{name} {share:.1%}" for name, share in found[who]["where"].items()) for who in WHO}
    about = (
        f"{setting['precision']}: {setting['blocks']} blocks, {setting['depths']} levels, {size}, batch "
        f"{setting['batch']}, channel multiplier {setting['width']}. **{shares['speedup_cpu']:.2f} times as fast**, "
        f"**{shares['memory']:.2f} of the memory**; architecture losses and a decoding "
        f"{shares['losses_and_decoding_share']:.2%} of a step. "
        f"Where "
        f"the time goes: MONAI {where['monai']}; ours {where['ours']}."
    )
    rows = [[name.strip(), f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}"] for name, a, b in rows_of(found)]
    return {"about": about, "columns": ["", "MONAI", "ours", "MONAI / ours"], "rows": rows}


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{'':28}{'MONAI':>12}{'ours':>12}")
    for name, theirs, mine in rows_of(found):
        print(f"{name:28}{theirs:12.2f}{mine:12.2f}")
    for name, ratio in found["ratios"].items():
        print(f"{name:28}{ratio:24.3f}")
    for who in WHO:
        print(f"{who}: " + ", ".join(f"{key} {100 * share:.1f} %" for key, share in found[who]["where"].items()))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--depths", type=int, default=4)
    parser.add_argument("--size", type=lambda text: tuple(int(n) for n in text.split(",")), default=(48, 64, 48))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="ours only")
    parser.add_argument("--skip-decode", action="store_true", help="MONAI's takes 12 s and 1.2 GB")
    parser.add_argument("--only", choices=WHO, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    arguments = sys.argv[1:]
    options = parse(arguments)
    if options.only:
        print(json.dumps(measure(options)))
        return
    found = compare(arguments, options)
    show(found)
    if options.device == "cpu":
        known = read("search_step") or {"title": TITLE, "found": {}}
        results = known["found"] | {options.precision: found}
        write("search_step", {"title": TITLE, "found": results, "tables": [table(f) for f in results.values()]})


if __name__ == "__main__":
    main()
