"""What this machine can run, what is missing, and the command that mends it: a table of checks, each a function.

A check only looks: it changes nothing and opens no connection. Packages of a higher layer have tables of their own of
the same form, and the command line joins them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from dints_deploy.catalog.catalog import entry_folders, verify_entry
from dints_deploy.errors import DintsError
from dints_deploy.files import state_folder
from dints_deploy.runtime.certificate import engines_folder, installed_certificates, read_certificate
from dints_deploy.runtime.certified import check_current, export_command
from dints_deploy.runtime.engine import (
    COMPUTES,
    FEW_WINDOWS,
    FIX,
    available_threads,
    choose_engine,
    engine_version,
    installed,
)
from dints_deploy.runtime.machine import BF16_FEATURES, cpu_features, cpu_model

Status = Literal["ok", "missing", "problem"]

LEAST_FREE_BYTES: Final = 2 << 30
"""Room in the state folder for a few plans and networks."""

EARLIEST: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""This software is younger: a clock before it is wrong."""

NVIDIA_DRIVER: Final = Path("/proc/driver/nvidia/version")
MANY_WINDOWS: Final = 1000


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        subject: what was looked at.
        status: ok; missing, for what is not there and need not be; problem, for what must be mended.
        found: what is there.
        fix: what to do; empty where nothing is to be done.
    """

    subject: str
    status: Status
    found: str
    fix: str = ""


Check = Callable[[], Iterator[Finding]]


def examine(checks: tuple[Check, ...]) -> list[Finding]:
    """Return the findings of all checks, in order."""
    return [finding for check in checks for finding in check()]


def processor() -> Iterator[Finding]:
    """Say what the processor computes with."""
    native = sorted(BF16_FEATURES.intersection(cpu_features()))
    yield Finding("processor", "ok", f"{cpu_model()}, {available_threads()} threads for this process")
    yield Finding("instruction sets", "ok", " ".join(cpu_features()) or "none that engines ask for")
    if native:
        yield Finding("bfloat16", "ok", f"computed by the processor ({', '.join(native)})")
    else:
        yield Finding(
            "bfloat16", "missing", "imitated by the engine, slower than fp32", "use --precision int8 for speed"
        )


def graphics() -> Iterator[Finding]:
    """Say which GPUs there are, and what they need."""
    if not NVIDIA_DRIVER.exists():
        yield Finding("NVIDIA driver", "missing", "none", "install NVIDIA's driver to use a GPU")
        return
    yield Finding("NVIDIA driver", "ok", NVIDIA_DRIVER.read_text(errors="replace").splitlines()[0])
    from dints_deploy.runtime.cuda import describe_gpu, driver_version

    try:
        yield Finding("GPU", "ok", f"{describe_gpu('cuda:0')}; CUDA {driver_version()}")
    except DintsError as error:
        yield Finding("GPU", "problem", error.message, FIX["tensorrt"])


def engines() -> Iterator[Finding]:
    """Say which engines are installed, in which precisions they compute, and what `auto` takes."""
    for name, fix in FIX.items():
        if installed(name) and (name != "onnx-trt" or _distribution("onnxruntime-gpu")):
            yield Finding(f"engine {name}", "ok", f"{engine_version(name)}; {', '.join(COMPUTES[name])}")
        else:
            yield Finding(f"engine {name}", "missing", "not installed", fix)
    both = [version for name in ("onnxruntime", "onnxruntime-gpu") if (version := _distribution(name))]
    if len(both) == 2:
        yield Finding(
            "ONNX Runtime", "problem", f"two packages of it that overwrite each other: {' and '.join(both)}",
            "pip uninstall onnxruntime onnxruntime-gpu, then install the one you want",
        )  # fmt: skip
    for windows in (FEW_WINDOWS, MANY_WINDOWS):
        try:
            engine, why = choose_engine("auto", windows=windows)
            yield Finding(f"auto, {windows} windows", "ok", f"{engine.name}: {why}")
        except DintsError as error:
            yield Finding(f"auto, {windows} windows", "problem", error.message, FIX["openvino"])


def extras() -> Iterator[Finding]:
    """Say which optional parts are installed."""
    for package, extra, purpose in (("onnx", "export", "reduced precision"), ("torch", "search", "training")):
        if importlib.util.find_spec(package):
            yield Finding(f"{package}, for {purpose}", "ok", importlib.metadata.version(package))
        else:
            yield Finding(f"{package}, for {purpose}", "missing", "none", f"pip install 'dints-deploy[{extra}]'")


def entries() -> Iterator[Finding]:
    """Verify every byte of every zoo entry."""
    for name in entry_folders():
        try:
            entry = verify_entry(name)
        except DintsError as error:
            yield Finding(f"entry {name}", "problem", str(error), f"install the entry again, or zoo remove {name}")
            continue
        weights = f"{len(entry.spec.members)} networks" if entry.spec.members else "a recipe, no weights"
        yield Finding(f"entry {name}", "ok", f"{entry.spec.version}, {len(entry.digests)} files verified, {weights}")


def state() -> Iterator[Finding]:
    """Look at the folder for what this machine makes: its rights and its room."""
    folder = state_folder()
    present = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(present).free
    enough = free >= LEAST_FREE_BYTES
    fix = "" if enough else "free some space, or set DINTS_STATE to a larger disk"
    yield Finding("room for plans", "ok" if enough else "problem", f"{free / 2**30:.1f} GiB free at {present}", fix)
    for path in (folder, engines_folder()):
        if not path.exists():
            yield Finding(f"folder {path.name}", "ok", f"{path} is made when it is needed")
            continue
        status = path.stat()
        mode = stat.S_IMODE(status.st_mode)
        good = status.st_uid in (os.geteuid(), 0) and not mode & 0o077
        fix = "" if good else f"chown it to yourself and chmod 700 {path}"
        found = f"{path}, owner {status.st_uid}, mode {mode:o}"
        yield Finding(f"folder {path.name}", "ok" if good else "problem", found, fix)


def certificates() -> Iterator[Finding]:
    """Check every local certificate: its seal, and whether it is still of this engine and device."""
    for path in installed_certificates():
        try:
            certificate = read_certificate(path)
            again = export_command(certificate.entry, certificate.target)
            check_current(certificate, again)
        except DintsError as error:
            yield Finding(f"certificate {path.name[:12]}", "problem", str(error), f"export again, or remove {path}")
            continue
        ratio = certificate.fp32_seconds_per_window / certificate.seconds_per_window
        about = f"{certificate.entry}: {certificate.target}, {ratio:.1f} times as fast as fp32, made {certificate.made}"
        yield Finding(f"certificate {path.name[:12]}", "ok", about)


def clock() -> Iterator[Finding]:
    """Compare the clock with this software's age: DICOM objects carry its date."""
    now = datetime.now(UTC)
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    right = now >= EARLIEST and now.timestamp() >= newest - 86400
    fix = "" if right else "set the clock; check that a time service runs"
    found = f"{now.isoformat(timespec='seconds')}, local zone {time.strftime('%Z')}"
    yield Finding("clock", "ok" if right else "problem", found, fix)


def _distribution(name: str) -> str:
    """Return name and version of an installed distribution; "" where it is not."""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


CHECKS: Final[tuple[Check, ...]] = (processor, graphics, engines, extras, entries, state, certificates, clock)
"""The appliance's checks, in the order of the report."""
