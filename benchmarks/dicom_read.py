"""Read 600 slices of 512x512 from DICOM: ours against a plain pydicom loop and SimpleITK, in one run.

    python -m benchmarks.dicom_read [--slices 200 600] [--repeats 3] [--syntax rle ...] [--work FOLDER] [--make]

Files are synthetic CT with noise, in the page cache. Each reader gives float32 values in order along the normal, equal
voxel by voxel. Times are the best of the repeats, taken in turn. Compressed slices are decoded in processes of their
own, which "ours" starts and ends within its time, as every case does. Peak memory is that of a process that reads once,
over its start, with the decoding processes: the largest sum of their proportional shares (PSS), looked at every few
milliseconds. Prints the tables and writes them to benchmarks/results/dicom_read.json; with --syntax, only those tables
are made anew. With --make the series are only made, and stay in the --work folder for a run that is measured.
SimpleITK is no dependency: `pip install SimpleITK`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread, dcmwrite
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from benchmarks.machine import read, write
from dints_deploy.dicom.decoders import Decoders
from dints_deploy.dicom.read import read_series
from dints_deploy.dicom.series import opened
from tests.dicom_phantoms import straight
from tests.dicom_phantoms import write as write_series

EDGE = 512
SYNTAXES = {"plain": ExplicitVRLittleEndian, "rle": RLELossless, "jpeg-ls": JPEGLSLossless, "j2k": JPEG2000Lossless}
SAMPLE_SECONDS = 0.005


def ours(folder: Path, decoders: Decoders | None = None) -> NDArray[np.float32]:
    """Read through the geometry gate, in parallel, as the command line and the daemon do."""
    with contextlib.ExitStack() as own:
        decoders = decoders or own.enter_context(Decoders())
        (series,) = own.enter_context(opened(folder, decoders=decoders)).series
        stack: NDArray[np.float32] = read_series(series, decoders=decoders).volume.data[0].transpose(2, 1, 0)
    return stack


def plain_pydicom(folder: Path) -> NDArray[np.float32]:
    """Read one file after the other."""
    datasets: list[Any] = [dcmread(path) for path in folder.iterdir()]
    datasets.sort(key=lambda ds: float(ds.ImagePositionPatient[2]))
    slices = [
        ds.pixel_array.astype(np.float32) * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in datasets
    ]
    return np.stack(slices).astype(np.float32)


def simpleitk(folder: Path) -> NDArray[np.float32]:
    """Read with GDCM through SimpleITK."""
    import SimpleITK

    itk: Any = SimpleITK
    reader = itk.ImageSeriesReader()
    reader.SetFileNames(itk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    return np.asarray(itk.GetArrayFromImage(reader.Execute()), dtype=np.float32)


Reader = Callable[[Path], NDArray[np.float32]]
RUNNING = "ours, decoders running"
READERS: dict[str, Reader] = {
    "ours": ours,
    "plain pydicom loop": plain_pydicom,
    "SimpleITK": simpleitk,
}


def make(folder: Path, slices: int, syntax: UID) -> Path:
    """Write a noisy CT of `slices` slices, unless it is there already."""
    if folder.is_dir():
        return folder
    rng = np.random.default_rng(0)
    body = np.hypot(*np.mgrid[-1 : 1 : EDGE * 1j, -1 : 1 : EDGE * 1j]) < 0.8
    pixels = (body * 1000 + rng.normal(0, 15, (slices, EDGE, EDGE)).astype(np.float32) + 100).astype(np.uint16)
    partial_folder = folder.with_name(f"{folder.name}.partial")
    for path in write_series(partial_folder, straight(slices, pixels=pixels, step=1.25, intercept=-1024.0)):
        if syntax != ExplicitVRLittleEndian:
            ds = dcmread(path)
            ds.compress(syntax, generate_instance_uid=False)
            dcmwrite(path, ds)
    return partial_folder.rename(folder)


def shortened(whole: Path, count: int) -> Path:
    """Return a folder of the first slices of a series: the same files under second names."""
    folder = whole.with_name(f"{whole.name}-{count}")
    if not folder.is_dir():
        folder.mkdir()
        for path in sorted(whole.iterdir())[:count]:
            os.link(path, folder / path.name)
    return folder


def peak_mb(name: str, folder: Path) -> float:
    """Return the peak memory of one reader and its processes over an idle process, measured in a process of its own."""
    code = (
        "import sys; from pathlib import Path; import benchmarks.dicom_read as b;"
        "print('idle', flush=True); input(); b.READERS[sys.argv[1]](Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, name, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        if reader.stdin is None or reader.stdout is None or reader.stdout.readline() != "idle\n":
            sys.exit(f"{name} does not start")
        idle = peak = proportional_mb(reader.pid)
        reader.stdin.write("\n")
        reader.stdin.flush()
        while reader.poll() is None:
            peak = max(peak, proportional_mb(reader.pid))
            time.sleep(SAMPLE_SECONDS)
    if reader.returncode:
        sys.exit(f"{name} fails")
    return peak - idle


def proportional_mb(process: int) -> float:
    """Return the memory of a process and of those it started: pages that several share count once, MB."""
    total = 0.0
    with contextlib.suppress(OSError):  # it has just ended
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        total += int(rollup.split("Pss:")[1].split()[0]) / 1024
        for task in Path(f"/proc/{process}/task").iterdir():
            total += sum(map(proportional_mb, map(int, (task / "children").read_text().split())))
    return total


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, nargs="+", default=[200, 600])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--syntax", choices=list(SYNTAXES), nargs="+", default=list(SYNTAXES))
    parser.add_argument("--work", type=Path, help="folder for the series; without, one that is removed")
    parser.add_argument("--make", action="store_true", help="only make the series")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, Decoders() as running:
        work = options.work or Path(scratch)
        made = {name: make(work / name, max(options.slices), SYNTAXES[name]) for name in options.syntax}
        if options.make:
            return
        readers: dict[str, Reader] = {**READERS, RUNNING: partial(ours, decoders=running)}
        tables = []
        for name, folder in made.items():
            for count in options.slices:
                tables.append(measure(SYNTAXES[name], shortened(folder, count), count, options.repeats, readers))
                print(tables[-1]["about"], *tables[-1]["rows"], sep="\n", flush=True)
    anew = {table["about"] for table in tables}
    earlier = (read("dicom_read") or {"tables": []})["tables"] if len(made) < len(SYNTAXES) else []
    tables = sorted([*(one for one in earlier if one["about"] not in anew), *tables], key=place)
    facts = {"best of": options.repeats, "values": "equal voxel by voxel among the readers"}
    write("dicom_read", {"title": f"Reading DICOM slices of {EDGE} x {EDGE}", "facts": facts, "tables": tables})


def place(table: dict[str, Any]) -> int:
    """Return where a table stands: in the order of SYNTAXES."""
    return [table["about"].startswith(syntax.name) for syntax in SYNTAXES.values()].index(True)


def measure(syntax: UID, folder: Path, count: int, repeats: int, readers: dict[str, Reader]) -> dict[str, Any]:
    """Return the table of one series."""
    reference = ours(folder)
    best = dict.fromkeys(readers, np.inf)
    for _ in range(repeats):
        for name, reader in readers.items():
            start = time.perf_counter()
            found = reader(folder)
            best[name] = min(best[name], time.perf_counter() - start)
            if not np.array_equal(found, reference):
                sys.exit(f"{name} reads other values")
    peaks = {name: f"{peak_mb(name, folder):.0f}" for name in READERS}
    rows = [[n, f"{s:.2f}", f"{best['ours'] / s:.2f}", peaks.get(n, "")] for n, s in best.items()]
    columns = ["reader", "s", "speed, ours = 1", "peak MB over an idle process"]
    return {"about": f"{syntax.name}, {count} slices:", "columns": columns, "rows": rows}


if __name__ == "__main__":
    main()
