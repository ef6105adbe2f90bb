"""Feed damaged and lying DICOM files to the reader: each must end in a volume or a code, soon and in little memory.

    python -m benchmarks.dicom_fuzz [--count 10000] [--seed 0]

Each input is a series of three small files, one or all of them altered: bytes flipped, cut, repeated or inserted,
lengths overwritten, attributes removed or set to values that make no sense, sequences nested deeply; now and then in a
zip, which is damaged too. Prints the fates, the slowest input and the peak of memory, and writes them to
benchmarks/results/dicom_fuzz.json; what crashed is kept in the folder it names.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom import dcmread, dcmwrite
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from benchmarks.machine import write
from dints_deploy.dicom.bounded import Limits, quiet
from dints_deploy.dicom.decoders import Decoders
from dints_deploy.dicom.findings import REGULARISING, STRICT, Policy
from dints_deploy.dicom.inspect import as_lines, describe
from dints_deploy.dicom.read import read_series
from dints_deploy.dicom.series import collect
from dints_deploy.errors import REASONS, DintsError
from tests.dicom_phantoms import straight, write_enhanced
from tests.dicom_phantoms import write as write_series

LIMITS = Limits(
    header_bytes=1 << 20, stack_bytes=64 << 20, archive_bytes=8 << 20, frame_seconds=5.0, decoder_bytes=1 << 30
)
"""Small limits, so that a violated one shows."""

PLAIN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
PACKED = (JPEG2000Lossless, JPEGLSLossless, RLELossless)
NASTY_NUMBERS = (
    "",
    "0",
    "-1",
    "1e308",
    "-1e308",
    "nan",
    "inf",
    "1e-320",
    "abc",
    "1\\2",
    "9" * 16,
    "\\",
    "1\\2\\3\\4\\5\\6",
)
NASTY_BYTES = (
    b"",
    b"\0",
    b"\xff\xff",
    b"\xff\xff\xff\xff",
    b"\x1b$B\x1b(B",
    b"A" * 65,
    b"\0\0\0\x80",
    b"../../etc/passwd",
)
TAGS = (
    0x00020010, 0x00080005, 0x00080008, 0x00080016, 0x00080018, 0x00080060, 0x0008103E, 0x00180050, 0x00181120,
    0x0020000D, 0x0020000E, 0x00200011, 0x00200013, 0x00200032, 0x00200037, 0x00200052, 0x00280002, 0x00280004,
    0x00280008, 0x00280010, 0x00280011, 0x00280030, 0x00280100, 0x00280101, 0x00280102, 0x00280103, 0x00280120,
    0x00281052, 0x00281053, 0x00283000, 0x52009229, 0x52009230, 0x7FE00010,
)  # fmt: skip
"""Attributes that the reader looks at."""


@dataclass
class Outcome:
    """What became of the inputs."""

    fates: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    crashes: list[str] = field(default_factory=list)
    peak_mb: float = 0.0


def corpus(folder: Path) -> list[list[bytes]]:
    """Return small intact series, each as the bytes of its files."""
    found = []
    for number, syntax in enumerate((*PLAIN, *PACKED)):
        phantom = straight(planes=3, rows=32, columns=32, seed=number)
        plain = syntax if syntax in PLAIN else ExplicitVRLittleEndian
        paths = write_series(folder / str(number), phantom, syntax=plain)
        for path in paths if syntax in PACKED else ():
            ds = dcmread(path)
            ds.compress(syntax, generate_instance_uid=False)
            dcmwrite(path, ds)
        found.append([path.read_bytes() for path in paths])
    found.append([write_enhanced(folder / "enhanced.dcm", straight(planes=4)).read_bytes()])
    return found


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with one to four alterations."""
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(ALTERATIONS)(data, rng)
    return data


def flip(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes anywhere, or near the start where the structure is."""
    changed = bytearray(data)
    reach = len(data) if rng.random() < 0.5 else min(len(data), 1500)
    for _ in range(rng.choice((1, 1, 3, 20))):
        if reach:
            changed[rng.randrange(reach)] = rng.randrange(256)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Cut the end off."""
    return data[: rng.randrange(len(data) + 1)]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """Copy a block to another place, over what is there or between."""
    if not data:
        return data
    start, to, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice((2, 8, 64, 512))
    return data[:to] + data[start : start + size] + data[to + rng.choice((0, size)) :]


def lengths(data: bytes, rng: random.Random) -> bytes:
    """Overwrite an even place with a length that lies."""
    at = 2 * rng.randrange(max(1, min(len(data), 2000) // 2))
    lie = rng.choice((0, 1, 2, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF))
    return data[:at] + struct.pack("<L", lie) + data[at + 4 :]


def element(data: bytes, rng: random.Random) -> bytes:
    """Replace, empty or remove an explicit or implicit element by its tag, without writing through pydicom."""
    tag = rng.choice(TAGS)
    at = data.find(struct.pack("<HH", tag >> 16, tag & 0xFFFF))
    if at < 0 or at + 8 > len(data):
        return data
    explicit = data[at + 4 : at + 6].isalpha()
    start = at + 8
    (size,) = struct.unpack("<H", data[at + 6 : start]) if explicit else struct.unpack("<L", data[at + 4 : start])
    size = min(size, len(data) - start)
    rest = data[start + size :]
    if rng.random() < 0.2:
        return data[:at] + rest
    value = rng.choice(NASTY_BYTES) if rng.random() < 0.5 else rng.choice(NASTY_NUMBERS).encode()
    if rng.random() < 0.5:  # keep the length: binary numbers, digits in place
        value = (value * size)[:size] if value else bytes(size)
    packed = struct.pack("<H", len(value)) if explicit else struct.pack("<L", len(value))
    return data[: start - len(packed)] + packed + value + rest


def nest(data: bytes, rng: random.Random) -> bytes:
    """Insert deeply nested sequences of undefined length after the file meta information."""
    deep = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    at = data.find(struct.pack("<HH", 0x0008, 0x0008))
    return data[:at] + deep * rng.choice((3, 200, 5000)) + data[at:] if at > 0 else data


ALTERATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip,
    cut,
    repeat,
    lengths,
    element,
    element,
    element,
    nest,
)


def run(count: int, seed: int, folder: Path) -> Outcome:
    """Read `count` altered series; keep what crashes under `folder`."""
    rng = random.Random(seed)
    intact = corpus(folder / "corpus")
    outcome = Outcome()
    with Decoders(2, limits=LIMITS) as decoders:
        for number in range(count):
            source = folder / f"input-{number:06d}"
            source.mkdir()
            _write_input(source, rng.choice(intact), rng)
            start = time.perf_counter()
            try:
                fate = _fate(source, decoders, rng.choice((STRICT, REGULARISING, Policy(minimum_slices=1))))
            except Exception as error:  # noqa: BLE001 - a crash of any kind is what this looks for
                fate = f"CRASH {type(error).__name__}"
                outcome.crashes.append(f"{source}: {error!r}")
            else:
                shutil.rmtree(source)
            outcome.slowest_s = max(outcome.slowest_s, time.perf_counter() - start)
            outcome.fates[fate] += 1
    outcome.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return outcome


def _write_input(source: Path, files: list[bytes], rng: random.Random) -> None:
    """Write a series with one file, or every file, altered; sometimes as an altered zip."""
    target = rng.randrange(len(files)) if rng.random() < 0.7 else None
    altered = [damage(data, rng) if target in (None, index) else data for index, data in enumerate(files)]
    if rng.random() > 0.05:
        for index, data in enumerate(altered):
            (source / f"{index}.dcm").write_bytes(data)
        return
    packed = source / "series.zip"
    with zipfile.ZipFile(packed, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for index, data in enumerate(altered):
            archive.writestr(f"{index}.dcm", data)
    packed.write_bytes(rng.choice((flip, cut, lengths, repeat))(packed.read_bytes(), rng))


def _fate(source: Path, decoders: Decoders, policy: Policy) -> str:
    """Return "volume" or the code of the last series or of the whole."""
    fate = "no series"
    packed = source / "series.zip"
    with tempfile.TemporaryDirectory() as scratch, quiet():
        try:
            study = collect(packed if packed.exists() else source, scratch=Path(scratch), limits=LIMITS)
            as_lines(describe(study, policy=policy))
        except DintsError as error:
            return _known(error)
        for item in study.findings:
            fate = item.code
        for series in study.series:
            try:
                volume = read_series(series, policy=policy, limits=LIMITS, decoders=decoders).volume
                fate = "volume" if np.isfinite(volume.data).all() else "volume that is not finite"
            except DintsError as error:
                fate = _known(error)
    return fate


def _known(error: DintsError) -> str:
    return error.code if error.code in REASONS else f"CRASH unknown code {error.code}"


def main() -> None:
    """Run, print and write the outcome."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dicom-fuzz-"))
    start = time.perf_counter()
    outcome = run(options.count, options.seed, folder)
    facts = {
        "inputs": options.count,
        "seed": options.seed,
        "crashes": len(outcome.crashes),
        "seconds": round(time.perf_counter() - start),
        "slowest input, s": round(outcome.slowest_s, 2),
        "peak memory of the reader, MB": round(outcome.peak_mb),
    }
    for name, value in facts.items():
        print(f"{name}: {value}")
    for fate, times in outcome.fates.most_common():
        print(f"{times:8d}  {fate}")
    for crash in outcome.crashes:
        print(crash)
    if not outcome.crashes:
        shutil.rmtree(folder)
    rows = [[f"`{fate}`", times] for fate, times in outcome.fates.most_common()]
    table = {"about": "Fate of each input:", "columns": ["volume or reason code", "inputs"], "rows": rows}
    title = "Damaged and lying files"
    write("dicom_fuzz", {"page": "dicom-measured", "title": title, "facts": facts, "tables": [table]})
    sys.exit(bool(outcome.crashes))


if __name__ == "__main__":
    main()
