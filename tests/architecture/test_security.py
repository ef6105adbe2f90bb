"""What the security page promises: each clause has a test that exists; and the clauses that no other test shows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from tests.daemons import daemon
from tests.dicom_phantoms import straight, write

ROOT = Path(__file__).parents[2]
APPLIANCE = sorted((ROOT / "dints_deploy").glob("**/*.py"))
CLAUSES = {
    "archives", "watched folders", "names", "display", "sizes", "damage", "networks", "entries", "plans", "HTTP",
    "rights", "senders", "destinations", "XML, pickle, eval", "connections", "privacy", "traces", "installation",
    "confinement",
}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "csv", "xml", "lxml", "yaml", "code", "codeop"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
EVIL = "evil"


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call with the last part of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_every_clause_of_the_security_page_names_tests_that_exist() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| [^|]+ \| [^|]+ \| ([^|]+) \|$", (ROOT / "docs" / "security.md").read_text(), re.M
    )
    table = {clause: re.findall(r"`([^`]+)`", tests) for clause, tests in rows if clause not in ("clause", "---")}
    assert set(table) == CLAUSES
    for clause, tests in table.items():
        assert tests, clause
        for test in tests:
            path, _, function = test.partition("::")
            assert f"\ndef {function}(" in (ROOT / path).read_text(), test


def test_nothing_that_runs_code_or_reads_xml_is_used() -> None:
    found = []
    for path in APPLIANCE:
        tree = ast.parse(path.read_text())
        found += [f"{path.name}: {name}" for name in imported(tree) if name in FORBIDDEN_MODULES]
        for name, call in calls(tree):
            plain = isinstance(call.func, ast.Name)
            if (plain and name in FORBIDDEN_CALLS) or name in ("system", "popen"):
                found.append(f"{path.name}:{call.lineno} {name}")
            if any(word.arg == "shell" for word in call.keywords):
                found.append(f"{path.name}:{call.lineno} shell")
            allowed = [word.value for word in call.keywords if word.arg == "allow_pickle"]
            if any(not (isinstance(value, ast.Constant) and value.value is False) for value in allowed):
                found.append(f"{path.name}:{call.lineno} allow_pickle")
    assert found == []


def test_nothing_is_written_as_svg_or_csv() -> None:
    """Formats in which a text of a study could act; what a person opens is HTML and PNG. Commands only name inputs."""
    writers = {path.name: path.read_text() for path in APPLIANCE if path.parent.name != "cli"}
    assert [name for name, text in writers.items() for word in (".svg", "svg+xml", ".csv") if word in text] == []


def test_sql_is_never_put_together_from_values() -> None:
    """Statements lie in .sql files or are constants; a PRAGMA takes no parameters, only constants."""
    found = []
    for path in sorted((ROOT / "dints_deploy" / "service").glob("*.py")):
        for name, call in calls(ast.parse(path.read_text())):
            if name.startswith("execute") and isinstance(call.args[0], ast.JoinedStr | ast.BinOp):
                found.append(ast.unparse(call.args[0])[2:])
    assert [text for text in found if not re.match("PRAGMA [a-z_]* ?=? ?{(pragma|APPLICATION_ID|len)", text)] == []


def test_hostile_texts_of_a_study_become_no_path_no_sql_and_no_log(tmp_path: Path) -> None:
    texts: dict[str, Any] = {
        "PatientID": f"'; DROP TABLE job; --{EVIL}",
        "PatientName": f"../../{EVIL}^$(touch {EVIL})",
        "StudyID": f"../{EVIL}",
        "SeriesDescription": f"../../../{EVIL}\x1b[2J<script>{EVIL}</script>",
        "AccessionNumber": f"`{EVIL}`",
        "ProtocolName": "%s%n{0}",
    }

    def hostile(ds: Dataset, index: int) -> None:
        ds.Modality = "CT"
        for keyword, text in texts.items():
            setattr(ds, keyword, text)

    paths = write(tmp_path / "study", straight(planes=4, rows=12, columns=12), change=hostile)
    with daemon(tmp_path / "site", outputs=("dicom-seg", "dicom-sr")) as place:
        place.send(paths, calling="';DROP TABLE x--")
        place.wait_done(1)
        assert place.rows("SELECT count(*) FROM job") == [(1,)]
        log = place.log.read_text()
    names = {part for path in place.folder.rglob("*") for part in path.relative_to(place.folder).parts}
    assert [name for name in names if not re.fullmatch(r"[A-Za-z0-9_.-]+", name)] == []
    assert not any(EVIL in name or "DROP" in name for name in names)
    assert EVIL not in log
    assert "DROP" not in log
    assert len(next(iter(place.delivered().values()))) == 2
