"""Read 600 slices of 512x512 from DICOM: ours against a plain pydicom loop and SimpleITK, in one run.

    python -m benchmarks.dicom_read [--slices 600] [--repeats 3]

Files are synthetic CT with noise, in the page cache. Each reader gives float32 values in order along the normal, equal
voxel by voxel. Times are the best of the repeats, taken in turn. Of the compressed syntaxes a third of the slices is
read; they are decoded in processes that a daemon keeps running and the command line starts. Peak memory is that of a
process that reads once, over its start, without the decoding processes. Prints the tables and writes them to
benchmarks/results/dicom_read.json. SimpleITK is no dependency: `pip install SimpleITK`.
"""

from __future__ import annotations

import argparse
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

from benchmarks.machine import write
from dints_deploy.dicom.decoders import Decoders
from dints_deploy.dicom.read import read_series
from dints_deploy.dicom.series import collect
from tests.dicom_phantoms import straight
from tests.dicom_phantoms import write as write_series

EDGE = 512
SYNTAXES = (ExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless)


def ours(folder: Path, decoders: Decoders | None = None) -> NDArray[np.float32]:
    """Read through the geometry gate, in parallel."""
    (series,) = collect(folder).series
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


def make(folder: Path, slices: int, syntax: str) -> None:
    """Write a noisy CT of `slices` slices."""
    rng = np.random.default_rng(0)
    body = np.hypot(*np.mgrid[-1 : 1 : EDGE * 1j, -1 : 1 : EDGE * 1j]) < 0.8
    pixels = (body * 1000 + rng.normal(0, 15, (slices, EDGE, EDGE)).astype(np.float32) + 100).astype(np.uint16)
    for path in write_series(folder, straight(slices, pixels=pixels, step=1.25, intercept=-1024.0)):
        if syntax != ExplicitVRLittleEndian:
            ds = dcmread(path)
            ds.compress(syntax, generate_instance_uid=False)
            dcmwrite(path, ds)


def peak_mb(name: str, folder: Path) -> float:
    """Return the peak memory of one reader over an idle process, measured in a process of its own."""
    code = (
        "import sys; from pathlib import Path; import benchmarks.dicom_read as b;"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1024;"
        "start = peak(); b.READERS[sys.argv[1]](Path(sys.argv[2])); print(peak() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code, name, str(folder)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    tables = []
    with Decoders() as running:
        for syntax in SYNTAXES:
            count = options.slices if syntax == ExplicitVRLittleEndian else max(options.slices // 3, 10)
            table = measure(syntax, count, options.repeats, {**READERS, RUNNING: partial(ours, decoders=running)})
            print(table["about"], *table["rows"], sep="\n")
            tables.append(table)
    facts = {"best of": options.repeats, "values": "equal voxel by voxel among the readers"}
    write("dicom_read", {"title": f"Reading DICOM slices of {EDGE} x {EDGE}", "facts": facts, "tables": tables})


def measure(syntax: UID, count: int, repeats: int, readers: dict[str, Reader]) -> dict[str, Any]:
    """Return the table of one transfer syntax."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder, count, syntax)
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
