"""The borders of the architecture hold when the program runs, not only on paper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "monai", "dints_search", "matplotlib", "highdicom")


def modules_after(code: str) -> set[str]:
    """Run code in a fresh interpreter and return the top-level modules it left behind."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_of_the_appliance_loads_no_heavy_package() -> None:
    assert modules_after("import dints_deploy").isdisjoint({*HEAVY, "scipy", "openvino", "onnxruntime", "PIL"})


def test_command_line_loads_no_heavy_package() -> None:
    assert modules_after("import dints_deploy.cli.main").isdisjoint({*HEAVY, "scipy", "openvino", "onnxruntime"})


def test_segmenting_a_scan_loads_neither_torch_nor_monai(tmp_path: Path, data: Path) -> None:
    scan = data / "Task04_Hippocampus" / "imagesTr" / "hippocampus_038.nii.gz"
    command = [sys.executable, "-X", "importtime", "-m", "dints_deploy", "segment", str(scan)]
    command += ["--model", "hippocampus", "-o", str(tmp_path / "x.nii.gz"), "--to", "nifti,preview,html"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert imported.isdisjoint(HEAVY)


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_segmenting_a_scan_opens_no_connection(engine: str, tmp_path: Path, data: Path) -> None:
    """Python's audit hook sees every socket of this process, and forks, which could open one unseen."""
    scan = data / "Task04_Hippocampus" / "imagesTr" / "hippocampus_038.nii.gz"
    words = ["segment", str(scan), "--model", "hippocampus", "--engine", engine, "-o", str(tmp_path / "x.nii.gz")]
    script = f"""
import sys
seen = []
events = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "os.fork", "subprocess.Popen")
sys.addaudithook(lambda event, args: seen.append(event) if event in events else None)
sys.argv = ["dints-deploy", *{words!r}]
from dints_deploy.cli.main import app
try:
    app()
except SystemExit as done:
    print("exit", done.code or 0)
print("seen", sorted(set(seen)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["exit 0", "seen []"]


WITHOUT_WORD = {"ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "GITHUB_ACTIONS", "TF_BUILD"}
"""Variables under which ONNX Runtime sends nothing by itself: a hospital sets none of them."""

USES = {
    "the engine alone": "import onnxruntime",
    "the appliance": "from dints_deploy.cli.main import app; from dints_deploy.runtime import onnx_engine",
    "the workshop": "import dints_search.publish, monai.networks.utils, onnxruntime",
}


@pytest.mark.parametrize("who", USES)
def test_onnx_runtime_keeps_no_identifier_and_no_queue_of_reports(who: str, tmp_path: Path) -> None:
    """It sends them seconds later, by code that no hook of Python sees; what it prepares for that lies in the home."""
    network = ROOT / "zoo" / "hippocampus" / "model.onnx"
    script = f"{USES[who]}\nimport onnxruntime\nonnxruntime.InferenceSession({str(network)!r})"
    environment = {name: value for name, value in os.environ.items() if name not in WITHOUT_WORD}
    for name in [name for name in environment if name.startswith("XDG_")]:
        del environment[name]
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "search")}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)
    left = [path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()]
    reports = {parts for parts in left if "Microsoft" in parts}
    assert bool(reports) == (who == "the engine alone"), left


def test_import_contracts_hold() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([str(lint)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("word", ["TODO", "FIXME", "XXX"])
def test_no_unfinished_mark_is_left_in_the_code(word: str) -> None:
    files = [*ROOT.glob("dints_deploy/**/*.py"), *ROOT.glob("search/**/*.py")]
    assert [path.name for path in files if word in path.read_text()] == []


def test_files_and_functions_stay_readable() -> None:
    """At most 400 lines a file and 60 a function, as the style guide says."""
    import ast

    long_ones = []
    for path in [*ROOT.glob("dints_deploy/**/*.py"), *ROOT.glob("search/**/*.py")]:
        text = path.read_text()
        if text.count("\n") > 400:
            long_ones.append(path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 60:
                long_ones.append(f"{path.name}:{node.name}")
    assert long_ones == []
