"""What large benchmarks run on: an entry around a published architecture with random weights, and scans of any size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from scipy.ndimage import zoom

from benchmarks.machine import ROOT
from benchmarks.tissue import tell_tissues_apart
from dints_deploy.catalog.weights import SUMS_FILE, write_sums
from dints_search.export import to_onnx
from dints_search.genotype import read_genotype
from dints_search.network import DiNTSNetwork, count_gmac

Shape = tuple[int, int, int]

GENOTYPE = ROOT / "zoo" / "dints-tutorial-sigma0.2" / "genotype.json"
LOWER, UPPER = -87.0, 199.0
"""The intensity window of the published pancreas recipe, HU."""

REDUCED_LIMITS = {"min_label_agreement": 0.98, "min_dice": 0.97, "min_hostile_label_agreement": 0.9}
"""Of the entry that tells tissues apart, looser than the defaults of 0.999, 0.99 and 0.95: its classes are steps of a
smooth image, so 2 to 3 % of the voxels lie within 10 HU of a step, where a trained network's labels have margins."""

STATE = "state.pt"
"""The network's weights for torch, beside the entry's ONNX file."""


def build(classes: int, multiplier: float) -> DiNTSNetwork:
    """Return the published architecture without weights of its own training."""
    return DiNTSNetwork(read_genotype(GENOTYPE), in_channels=1, num_classes=classes, channel_multiplier=multiplier)


def make_entry(
    root: Path, *, classes: int, multiplier: float, window: int, overlap: float, scan: Path | None = None
) -> tuple[Path, float]:
    """Write an entry with random weights and return its folder and the network's GMAC for one window.

    Args:
        root: of the zoo; the entry lies in it under its name.
        classes: logit channels, background included.
        multiplier: of the channels.
        window: voxels along every axis.
        overlap: of neighbouring windows.
        scan: a CT, for a network of three classes that tells its tissues apart, and for the windows on which reduced
            precisions prove themselves; None for random weights and no such windows.
    """
    torch.manual_seed(0)
    network = build(classes, multiplier).eval()
    if scan is not None:
        windows = middle_windows(scan, window)
        tell_tissues_apart(network, windows[0, 0], LOWER + (UPPER - LOWER) * windows[0, 0])
    folder = root / f"random-{classes}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fields = entry_fields(folder.name, classes, window, overlap)
    if scan is not None:
        fields["parity"] = {"reduced": REDUCED_LIMITS}
    (folder / "entry.toml").write_text(tomli_w.dumps(fields))
    shutil.copyfile(GENOTYPE, folder / "genotype.json")
    (folder / "model.onnx").write_bytes(to_onnx(network, (window,) * 3))
    if scan is not None:
        with torch.inference_mode():
            logits = network(torch.from_numpy(windows)).numpy()
        np.savez_compressed(folder / "parity_inputs.npz", windows=windows, logits0=logits)
    (folder / SUMS_FILE).write_text(write_sums(folder))
    torch.save(network.state_dict(), root / f"{folder.name}.{STATE}")
    return folder, count_gmac(network, (window,) * 3)


def entry_fields(name: str, classes: int, window: int, overlap: float) -> dict[str, Any]:
    """Return what `entry.toml` says: any CT at its own spacing, clipped to the recipe's window."""
    labels = [
        {
            "value": value,
            "id": f"part-{value}",
            "name": f"Part {value}",
            "colour": [value % 256, 200, 30],
            "category": {"value": "91723000", "scheme": "SCT", "meaning": "Anatomical Structure"},
            "type": {"value": f"P{value}", "scheme": "99RANDOM", "meaning": f"Part {value}"},
            "nsd_tolerance": 1.0,
        }
        for value in range(1, classes)
    ]
    intensity = {"scheme": "window", "lower": LOWER, "upper": UPPER}
    return {
        "schema_version": 1,
        "name": name,
        "version": "1.0.0",
        "title": "Random weights",
        "intended_use": "Benchmarks.",
        "licence": "Apache-2.0",
        "genotype": "genotype.json",
        "members": [{"onnx": "model.onnx"}],
        "channels": [{"name": "CT", "modality": "CT", "fill": "minimum", "intensity": intensity}],
        "labels": labels,
        "window": [window] * 3,
        "overlap": overlap,
        "accepts": {
            "modality": ["CT"],
            "extent_min": [1.0] * 3,
            "extent_max": [2000.0] * 3,
            "spacing_min": [0.1] * 3,
            "spacing_max": [10.0] * 3,
        },
    }


def middle_windows(scan: Path, window: int) -> NDArray[np.float32]:
    """Return two windows (2, 1, I, J, K) from the middle of a scan, prepared as the entry says."""
    voxels = np.asarray(nibabel.load(scan).dataobj, np.float32)
    first = [(n - window) // 2 for n in voxels.shape]
    boxes = [tuple(slice(max(0, a - d), max(0, a - d) + window) for a in first) for d in (0, window // 2)]
    cut = np.stack([voxels[box] for box in boxes])[:, np.newaxis]
    return (np.clip(cut, LOWER, UPPER) - np.float32(LOWER)) / np.float32(UPPER - LOWER)


def make_ct(source: Path, path: Path, factor: float) -> Path:
    """Write a CT resampled to `factor` times the voxels along each axis, linear, int16."""
    image = nibabel.load(source)
    voxels = zoom(np.asarray(image.dataobj, dtype=np.float32), factor, order=1)
    affine = image.affine @ np.diag([1 / factor] * 3 + [1])
    nibabel.save(nibabel.Nifti1Image(np.asfortranarray(voxels.round().astype(np.int16)), affine), path)
    return path


def make_eighth(source: Path, path: Path) -> Path:
    """Write the middle of a scan: half of each axis."""
    image = nibabel.load(source)
    quarter = [n // 4 for n in image.shape]
    middle = tuple(slice(q, q + n // 2) for q, n in zip(quarter, image.shape, strict=True))
    nibabel.save(image.slicer[middle], path)
    return path


def make_noise(path: Path, shape: Shape) -> Path:
    """Write an int16 scan of noise, 1 mm: no window of it is of one value."""
    voxels = np.empty(shape, np.int16, order="F")
    rng = np.random.default_rng(0)
    for k in range(shape[2]):
        voxels[:, :, k] = rng.integers(-200, 300, shape[:2])
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return path
