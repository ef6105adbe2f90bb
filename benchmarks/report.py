"""Write docs/performance.md from the JSON that the benchmarks left in benchmarks/results/.

python -m benchmarks.report
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.machine import ROOT

PAGE = ROOT / "docs" / "performance.md"
HEAD = """# Performance

Made by `python -m benchmarks.report` from `benchmarks/results/*.json`; do not edit. Every table is one run in which the
contenders alternate on one machine, so the ratios count, not the seconds.
"""


def main() -> None:
    """Write the page."""
    parts = [HEAD]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        parts.append(section(path.stem, json.loads(path.read_text())))
    PAGE.write_text("\n".join(parts))
    print(PAGE)


def section(name: str, result: dict[str, Any]) -> str:
    """Return one benchmark as a table."""
    machine = result["machine"]
    lines = [
        f"## {result.get('title', name)}",
        "",
        f"`python -m benchmarks.{name}` at commit `{machine['commit'][:10]}`, {machine['processor']}, "
        f"{machine['cores']} cores, Python {machine['python']}.",
        "",
    ]
    if "median" in result:
        lines += ["| contender | median s | times faster than the peer |", "|---|---|---|"]
        lines += [f"| {k} | {v:.2f} | {result['ratio'][k]:.1f} |" for k, v in result["median"].items()]
    lines += ["", *[f"- {key}: {value}" for key, value in result.get("facts", {}).items()], ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
