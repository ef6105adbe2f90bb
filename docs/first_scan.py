"""A first scan, for Python users: segment a real hippocampus crop, compare it with the reader's label, draw a picture.

python docs/first_scan.py            (`make demo` installs what it needs and runs it)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dints_deploy import Volume, load_entry, read_nifti, segment, write_nifti
from dints_deploy.catalog.entry import RESEARCH_USE
from dints_deploy.files import replacing
from dints_deploy.runtime.metrics import score_case
from dints_deploy.runtime.preview import render

ROOT = Path(__file__).parents[1]
CASE = "hippocampus_038"
OUT = ROOT / "out"


def main() -> None:
    """Run the demo and print what it finds."""
    task = ROOT / "tests" / "data" / "Task04_Hippocampus"
    begin = time.perf_counter()
    scan = read_nifti(task / "imagesTr" / f"{CASE}.nii.gz")
    entry = load_entry("hippocampus")
    result = segment(scan, entry)
    OUT.mkdir(exist_ok=True)
    write_nifti(OUT / f"{CASE}_seg.nii.gz", result.labels)
    seconds = time.perf_counter() - begin

    reader = read_nifti(task / "labelsTr" / f"{CASE}.nii.gz")
    scores = score_case(
        result.labels.data[0],
        reader.data[0].astype("uint8"),
        labels=[label.value for label in entry.spec.labels],
        spacing=scan.grid.spacing,
        tolerances=[label.nsd_tolerance for label in entry.spec.labels],
    )
    say(f"{CASE}: a T1-weighted MR crop that the network has not seen in training")
    for label in entry.spec.labels:
        volume, dice = result.volumes_ml[label.id], scores.dice[label.value]
        say(f"  {label.name:<24} {volume:6.3f} mL   Dice against the reader's label {dice:.3f}")
    engine = result.session
    say(f"  {seconds:.2f} s with {engine.engine} {engine.version}, {engine.precision} ({engine.why})")
    say(f"  labels   {OUT / f'{CASE}_seg.nii.gz'}")
    say(f"  picture  {draw(scan, result.labels, reader)}")
    say(f"  {RESEARCH_USE}")


def draw(scan: Volume, prediction: Volume, reader: Volume) -> Path:
    """Draw image, prediction and label side by side in three planes."""
    entry = load_entry("hippocampus").spec
    columns = [("image", None), ("prediction", prediction), ("reader's label", reader)]
    path = OUT / f"{CASE}.png"
    with replacing(path) as partial:
        render(scan, columns, entry, f"{entry.name} {entry.version}, MSD {CASE}").save(partial)
    return path


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
