"""Write docs/performance.md and docs/dicom-measured.md from the JSON that the benchmarks left in benchmarks/results/.

python -m benchmarks.report
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.machine import ROOT

PAGES = {
    "performance": """# Performance

Made by `python -m benchmarks.report` from `benchmarks/results/*.json`; do not edit. Every table is one run in which the
contenders alternate on one machine, so the ratios count, not the seconds.
""",
    "dicom-measured": """# DICOM, measured

Made by `python -m benchmarks.report` from `benchmarks/results/*.json`; do not edit. What is read and written is
described in [dicom.md](dicom.md).
""",
}
"""Page in docs/ -> its head. A result names its page; without, it belongs to performance."""


def main() -> None:
    """Write the pages."""
    parts = {name: [head] for name, head in PAGES.items()}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        parts[result.get("page", "performance")].append(section(path.stem, result))
    for name, sections in parts.items():
        page = ROOT / "docs" / f"{name}.md"
        page.write_text("\n".join(sections))
        print(page)


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
    for table in result.get("tables", []):
        lines += rows(table)
    lines += ["", *[f"- {key}: {value}" for key, value in result.get("facts", {}).items()], ""]
    return "\n".join(lines)


def rows(table: dict[str, Any]) -> list[str]:
    """Return a table of {"columns": names, "rows": lists of text}, under its "about" where it has one."""
    about = [table["about"], ""] if "about" in table else []
    columns = table["columns"]
    lines = [columns, ["---"] * len(columns), *table["rows"]]
    return [*about, *["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines], ""]


if __name__ == "__main__":
    main()
