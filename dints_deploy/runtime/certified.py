"""Which engine runs an entry's networks, and in which form: nothing but fp32 runs without a certificate.

fp32 on an engine that is no compiler needs none beyond the entry's own. Everything else runs only with a local
certificate for exactly these weights, this engine's version and this device (see `certificate`).
"""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Final

from dints_deploy.catalog.catalog import LoadedEntry, runnable
from dints_deploy.catalog.entry import Entry, Member
from dints_deploy.errors import EngineError, UsageError
from dints_deploy.runtime.engine import (
    COMPILED,
    COMPUTES,
    PRECISIONS,
    Engine,
    Session,
    available_threads,
    build_engine,
    check_precision,
    choose_engine,
    engine_version,
    installed,
)

if TYPE_CHECKING:  # a run in fp32 does not pay for reading certificates
    from dints_deploy.runtime.certificate import LocalCertificate, Target

Choice = tuple[Engine, list[bytes], str]
"""An engine, the network of each member in the form it takes, and why it was chosen."""

Certified = tuple[str, list[bytes], str]
"""The same with the name of the engine, which is built when the networks are known."""

LONG_RUN: Final = 32
"""From this many runs of a network on, a last window that computes alone costs less than the others win."""

LEAST_WINDOWS: Final = 64
"""From this many runs on, fewer multiplications win back what it takes to rewrite a network (about 10 s)."""

INPUTS_FILE: Final = "parity_inputs.npz"
"""In an entry: real windows and torch's logits on them."""

MOST_LOGITS_BYTES: Final = 64 << 20
"""Of one window, up to which two windows compute at a time: 18 classes over 96 x 96 x 96."""

EXPORT_FLAGS: Final = {"onnx": "--onnx", "openvino": "--openvino", "tensorrt": "--trt", "onnx-trt": "--onnx-trt"}


def choose_networks(
    entry: LoadedEntry,
    *,
    windows: int,
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
    threads: int | None = None,
    fewer_products: bool = False,
) -> Choice:
    """Return the engine to run an entry with, and its networks; arguments as for `segment` and `choose_engine`.

    Raises:
        UsageError: there is no such engine, precision or device, or not together.
        EngineError: `engine-missing`; `no-certificate`, with the command that makes one; `certificate-invalid`,
            `certificate-stale`, `artefact-damaged` or `state-permissions`.
    """
    if precision not in PRECISIONS:
        raise UsageError("usage", f"expected a precision of {', '.join(PRECISIONS)}, found {precision!r}")
    threads = threads or available_threads()
    at_once = side_by_side(runnable(entry).spec, windows, threads)
    chosen, why = choose_engine(
        engine, windows=windows, device=device, threads=threads, at_once=at_once, fewer_products=fewer_products
    )
    if precision == "fp32" and engine not in COMPILED:
        certified = _plan_if_any(entry, device) if engine == "auto" and device != "cpu" else ""
        if isinstance(certified, str):
            return chosen, [entry.member_bytes(member) for member in runnable(entry).spec.members], why + certified
    else:
        names = [engine] if engine != "auto" else _able(precision, device)
        certified = _fastest(entry, names, precision, device, asked=engine != "auto")
    name, networks, why = certified
    return build_engine(name, device, threads, at_once=at_once), networks, why


def side_by_side(spec: Entry, windows: int, threads: int) -> int:
    """Return how many windows of a run compute at a time in OpenVINO (docs/decisions/0022-two-windows-side-by-side.md).

    Two, each on half of the threads, wait less for one another's threads than one on all of them does. The networks of
    an ensemble do so already, and the logits of a hundred classes leave no memory for a second window.
    """
    small = 4 * spec.outputs * math.prod(spec.window) <= MOST_LOGITS_BYTES
    return 2 if windows >= LONG_RUN and threads % 2 == 0 and len(spec.members) == 1 and small else 1


def may_rewrite(entry: LoadedEntry, windows: int, engine: str, precision: str) -> bool:
    """Say whether a run may take fewer multiplications (docs/decisions/0024-fewer-multiplications.md).

    OpenVINO in fp32, where the entry has windows to prove the outcome on, and one network: each member would cost the
    start and the memory again. `engine` is a name, not `auto`.
    """
    if (engine, precision) != ("openvino", "fp32"):
        return False
    return windows >= LEAST_WINDOWS and len(entry.spec.members) == 1 and INPUTS_FILE in entry.digests


def not_proven(entry: LoadedEntry, session: Session) -> str:
    """Return what a rewritten network misses of the fp32 limits on the entry's first real window; "" for nothing.

    The reference is the entry's: torch's logits.

    Raises:
        EntryError: the window cannot be read. EngineError: the engine fails.
    """
    from dints_deploy.runtime.parity import misses_on, stored_windows

    window, (logits,) = stored_windows(entry, 1)
    return "; ".join(misses_on(session, entry.spec, window, logits))


def _able(precision: str, device: str) -> list[str]:
    """Return the installed engines that compute in a precision on a device.

    Raises:
        UsageError: `usage` when there is none.
    """
    names = ["openvino", "onnx"] if device == "cpu" else ["tensorrt", "onnx-trt", "onnx"]
    able = [name for name in names if installed(name) and precision in COMPUTES[name]]
    if not able:
        raise UsageError("usage", f"expected an installed engine that computes in {precision} on {device}, found none")
    return able


def _plan_if_any(entry: LoadedEntry, device: str) -> Certified | str:
    """Return the compiled fp32 plan of a GPU; where there is none that may be used, why not, if one was there."""
    try:
        names = [name for name in _able("fp32", device) if name in COMPILED]
        return _fastest(entry, names, "fp32", device, asked=False) if names else ""
    except EngineError as refusal:
        return "" if refusal.code == "no-certificate" else f"; a plan was left aside: {refusal.message}"


def _fastest(entry: LoadedEntry, names: list[str], precision: str, device: str, *, asked: bool) -> Certified:
    """Return the fastest of the engines that have valid certificates for all members.

    Raises:
        EngineError: no engine has; the reason is that of the first one whose certificate is there but not valid.
    """
    from dints_deploy.runtime.certificate import Target, read_artefact

    found: dict[str, list[LocalCertificate]] = {}
    refusals: list[EngineError] = []
    members = runnable(entry).spec.members
    for name in names:
        check_precision(name, precision)
        target = Target(engine=name, precision=precision, device=device)
        try:
            found[name] = [find_certificate(entry, member, target) for member in members]
        except EngineError as refusal:
            refusals.append(refusal)
    if not found:
        raise next((r for r in refusals if r.code != "no-certificate"), refusals[0])
    name = min(found, key=lambda name: sum(c.seconds_per_window for c in found[name]))
    seconds = sum(certificate.seconds_per_window for certificate in found[name])
    why = "asked for" if asked else f"fastest of {len(found)} certified on this machine"
    networks = [
        entry.member_bytes(member) if (data := read_artefact(certificate)) is None else data
        for member, certificate in zip(members, found[name], strict=True)
    ]
    return name, networks, f"{why}, {seconds:.3g} s a window at export"


def find_certificate(entry: LoadedEntry, member: Member, target: Target) -> LocalCertificate:
    """Return the valid certificate of a member's weights on a target.

    Raises:
        EngineError: `no-certificate`, `certificate-invalid`, `certificate-stale` or `state-permissions`.
    """
    from dints_deploy.runtime.certificate import certificate_path, read_certificate
    from dints_deploy.runtime.parity import exceeded

    digest = entry.digests[member.onnx]
    again = export_command(entry.spec.name, target)
    path = certificate_path(digest, target)
    if not path.is_file():
        raise EngineError("no-certificate", f"expected a certificate for {target}, found none: {again}")
    certificate = read_certificate(path)
    if (certificate.comparison.onnx_sha256, certificate.target) != (digest, target):
        raise EngineError("certificate-invalid", f"expected {path.name} for its weights, found it for others: {again}")
    check_current(certificate, again)
    if misses := exceeded(certificate.comparison, entry.spec):
        raise EngineError("certificate-stale", f"expected a certificate with {'; '.join(misses)}: {again}")
    return certificate


def check_current(certificate: LocalCertificate, again: str) -> None:
    """Refuse a certificate of another engine version or device than those of now.

    Args:
        certificate: whose seal was checked.
        again: the command that makes a new one.

    Raises:
        EngineError: `certificate-stale`, or `engine-missing` when the device is gone.
    """
    from dints_deploy.runtime.machine import describe_device

    target = certificate.target
    expected = (engine_version(target.engine), describe_device(target.device))
    named = (certificate.comparison.version, certificate.machine)
    for what, ours, theirs in zip((f"{target.engine} version", "device"), expected, named, strict=True):
        if ours != theirs:
            raise EngineError(
                "certificate-stale", f"expected a certificate for the {what} {ours!r}, found {theirs!r}: {again}"
            )


def export_command(entry: str, target: Target) -> str:
    """Return the command that makes a certificate, as a user types it."""
    device = "" if target.device in ("cpu", "cuda:0") and target.engine in ("openvino", *COMPILED) else target.device
    words = ["dints-deploy", "export", entry, EXPORT_FLAGS[target.engine], "--precision", target.precision]
    if device not in ("", "cpu"):
        words += ["--device", device]
    return shlex.join(words)
