"""What would happen to a study: the routes that take it, and what each entry would say to its series."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dints_deploy.catalog.catalog import load_entry
from dints_deploy.config.appliance import Config
from dints_deploy.config.delivery import Route
from dints_deploy.dicom.series import Study, opened
from dints_deploy.errors import DintsError, UsageError
from dints_deploy.process.choose import choose_series
from dints_deploy.service.route import check_routes, choose, doors_of, study_facts


def rehearse(source: Path, config: Config, *, called: str | None = None, calling: str = "") -> dict[str, Any]:
    """Return, as JSON-ready data, what each route would do with a study.

    Args:
        source: a DICOM folder, a zip of one, or a file.
        config: whose routes are tried.
        called: the AE title or folder it comes to; None for each of the configuration.
        calling: AE title of the sender.

    Raises:
        UsageError: the configuration is not sound, or has no such AE title or folder.
        ScanRefused: the source holds no DICOM files.
    """
    check_routes(config)
    doors = list(doors_of(config))
    if called is not None and called not in doors:
        raise UsageError("usage", f"expected --called of {', '.join(doors)}, found {called}")
    with opened(source) as study:
        facts = study_facts(study, doors=doors if called is None else [called], calling=[calling] if calling else [])
        by_name = {route.name: route for route in config.routes}
        routes = [
            {
                "route": match.route,
                "taken": match.taken,
                "reason": match.reason,
                **(_then(by_name[match.route], study) if match.taken else {}),
            }
            for match in choose(config, facts)
        ]
    return {"called": called, "calling": calling, "routes": routes}


def _then(route: Route, study: Study) -> dict[str, Any]:
    """Return what follows when a route takes a study."""
    about = {
        "entry": route.entry,
        "outputs": list(route.outputs),
        "destinations": list(route.destinations),
        "priority": route.priority,
    }
    try:
        choice = choose_series({"": study}, load_entry(route.entry).spec)
    except DintsError as refusal:
        sent = route.send_refusals and "dicom-sr" in route.outputs
        return about | {"refusal": {"code": refusal.code, "message": refusal.message, "sent": sent}}
    return about | {"series": {channel: series.label for channel, series in choice.series.items()}}


def as_lines(found: dict[str, Any]) -> list[str]:
    """Return what `rehearse` returns as lines for a terminal."""
    lines = []
    for one in found["routes"]:
        lines.append(f"{one['route']}: {'takes the study' if one['taken'] else 'passes'}: {one['reason']}")
        if not one["taken"]:
            continue
        lines.append(f"  entry {one['entry']} -> {', '.join(one['outputs'])} -> {', '.join(one['destinations'])}")
        if "refusal" in one:
            said = "; the refusal is sent as an SR" if one["refusal"]["sent"] else ""
            lines.append(f"  refused: {one['refusal']['message']} [{one['refusal']['code']}]{said}")
        else:
            lines += [f"  channel {channel}: series {label}" for channel, label in one["series"].items()]
    return lines or ["no route"]
