"""What is said about a result: one record for `--json`, the page and the daemon, with provenance and no identifiers."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from dints_deploy.catalog.catalog import LoadedEntry
from dints_deploy.catalog.entry import RESEARCH_USE
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.segment import Segmentation


def software_version() -> str:
    """Return the version of the installed package."""
    return version("dints-deploy")


def describe(
    result: Segmentation, entry: LoadedEntry, scan: Volume, *, input_digests: dict[str, str], parity: str
) -> dict[str, Any]:
    """Return the record of a result, ready for JSON.

    Args:
        result: of `segment`.
        entry: that ran.
        scan: that was segmented.
        parity: whether the engine is certified for these weights.
        input_digests: channel name -> SHA-256 of its file.
    """
    spec, session = entry.spec, result.session
    return {
        "research_use": RESEARCH_USE,
        "structures": [
            {
                "id": label.id,
                "name": label.name,
                "value": label.value,
                "volume_ml": round(result.volumes_ml[label.id], 4),
            }
            for label in spec.labels
        ],
        "scan": {
            "shape": list(scan.shape),
            "spacing_mm": [round(s, 6) for s in scan.grid.spacing],
            "sha256": input_digests,
        },
        "model": {
            "entry": spec.name,
            "version": spec.version,
            "weights_sha256": [entry.digests[member.onnx] for member in spec.members],
            "genotype_sha256": entry.digests.get(spec.genotype or ""),
        },
        "engine": {
            "name": session.engine,
            "version": session.version,
            "device": session.device,
            "precision": session.precision,
            "why": session.why,
            "gmac_saved_per_window": round(session.products_saved / 1e9, 3),
            "windows": result.plan.windows,
            "windows_run": result.windows_run,
            "network_bytes": result.network_bytes,
        },
        "plan": {
            "blocks": len(result.plan.blocks),
            "windows_again": result.plan.again,
            "peak_bytes": result.plan.peak_bytes,
        },
        "software": {"dints-deploy": software_version(), "python": platform.python_version()},
        "parity": parity,
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
    }
