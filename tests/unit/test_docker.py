"""The container files hold together: linted, locked, equal where they must be, with configurations that are sound."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from dints_deploy.config.appliance import Config, Http
from dints_deploy.config.load import load_config
from dints_deploy.service.health import serve
from dints_deploy.service.model import Snapshot
from tests.peers import certificates, free_port

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_linter_finds_nothing(path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "-c", DOCKER / "hadolint.yaml", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_is_locked_labelled_and_not_roots(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ")
    installs = [line for line in re.split("&&|\n", text) if re.search(r"/pip install", line)]
    assert all("-c constraints.txt" in line or "grep '^torch==' constraints.txt" in line for line in installs)
    last = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    labels = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", last))
    assert labels == {"title", "description", "licenses", "version", "revision", "created"}
    assert ("HEALTHCHECK" in last) == path.name.startswith("runtime")
    assert "Research use only" in text


def test_every_file_that_is_copied_is_let_through_to_the_build() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for path in DOCKERFILES:
        for words in re.findall(r"^COPY (?!--from)(.+) \S+$", path.read_text(), re.MULTILINE):
            for word in words.split():
                assert (ROOT / word).exists(), word
                assert word.split("/")[0] in allowed, word


def test_runtime_images_differ_only_in_what_the_processor_asks_for() -> None:
    """The GPU image is not built in the tests: it is the tested one but for base, extra, path, words and start time."""
    cpu, gpu = ((DOCKER / f"{name}.Dockerfile").read_text().splitlines() for name in ("runtime", "runtime-gpu"))
    said = [line for line in set(cpu) ^ set(gpu) if not line.startswith("#")]
    kinds = ("ARG BASE=", "RUN python3 requirements.py", "ENV PATH=", "LABEL org", "      org", "HEALTHCHECK ")
    assert [line for line in said if not line.startswith(kinds)] == []


@pytest.mark.parametrize("name", ["appliance.toml", "appliance.gpu.toml"])
def test_shipped_configuration_is_sound_and_fits_compose(name: str, tmp_path: Path) -> None:
    copy = tmp_path / name
    copy.write_bytes((DOCKER / name).read_bytes())
    config: Config = load_config(copy)
    services = compose()["services"]
    (pacs,) = config.destinations
    orthanc = json.loads((DOCKER / "orthanc.json").read_text())
    assert pacs.kind == "dicom"
    assert pacs.host in services
    assert (pacs.port, pacs.ae_title) == (orthanc["DicomPort"], orthanc["DicomAet"])
    (ours,) = orthanc["DicomModalities"].values()
    title = config.listeners[0].titles[0].ae_title
    assert (ours["AET"], ours["Host"], ours["Port"]) == (title, "dints-deploy", config.listeners[0].port)
    assert pacs.calling_ae_title == title
    volume = services["dints-deploy"]["volumes"][0].split(":")[1]
    assert config.data_dir.is_relative_to(volume)
    assert config.worker.devices == (("cuda:0",) if "gpu" in name else ("cpu",))


def test_compose_keeps_the_daemon_confined_and_its_files_exist() -> None:
    daemon = compose()["services"]["dints-deploy"]
    assert daemon["read_only"] is True
    assert daemon["cap_drop"] == ["ALL"]
    assert daemon["security_opt"] == ["no-new-privileges:true"]
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    for document in (compose(), compose("compose.gpu.yaml")):
        for service in document["services"].values():
            if "build" in service:
                assert (ROOT / service["build"]["dockerfile"]).is_file()
        for config in document.get("configs", {}).values():
            assert (DOCKER / config["file"]).is_file()
    assert "docker/secrets" in (ROOT / ".gitignore").read_text()


@pytest.mark.parametrize("more", [[], ["compose.gpu.yaml"]], ids=["CPU", "GPU"])
def test_compose_itself_takes_the_files_without_a_warning(more: list[str]) -> None:
    program = Path(sys.executable).parent / "docker-compose"
    files = [word for name in ["compose.yaml", *more] for word in ("--file", str(DOCKER / name))]
    done = subprocess.run([program, *files, "config", "--quiet"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_secrets_are_made_once_and_never_the_same_and_the_containers_can_read_their_files(tmp_path: Path) -> None:
    passwords = set()
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        script = folder / "secrets.sh"
        script.write_bytes((DOCKER / "secrets.sh").read_bytes())
        mounted = [folder / name for name in ("appliance.toml", "appliance.gpu.toml", "orthanc.json")]
        for path in mounted:
            path.touch(mode=0o600)
        said = subprocess.run(["sh", script], capture_output=True, text=True, check=True).stdout
        users = json.loads((folder / "secrets" / "orthanc-users.json").read_text())["RegisteredUsers"]
        assert users["orthanc"] in said
        assert (folder / "secrets").stat().st_mode & 0o077 == 0
        assert all(path.stat().st_mode & 0o004 for path in mounted)
        passwords.add(users["orthanc"])
        assert subprocess.run(["sh", script], capture_output=True, check=False).returncode == 1
    assert len(passwords) == 2


@contextmanager
def health(folder: Path, problems: tuple[str, ...], **more: Any) -> Iterator[Path]:
    """Serve health and yield a configuration that says where."""
    port = free_port()
    table = {"port": port} | more
    server = serve(Http.model_validate(table), lambda: Snapshot(problems=problems))
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items() if key != "tls")
    tls = "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.get("tls", {}).items())
    config = folder / f"{port}.toml"
    config.write_text(f"[http]\n{text}\n" + (f"[http.tls]\n{tls}" if tls else ""))
    tomllib.loads(config.read_text())
    try:
        yield config
    finally:
        threading.Thread(target=server.stop).start()


def check(config: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, DOCKER / "healthcheck.py", config], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_health_check_follows_readiness(tmp_path: Path) -> None:
    with health(tmp_path, ()) as config:
        assert check(config)[0] == 0
    with health(tmp_path, ("the disk is full",)) as config:
        code, said = check(config)
    assert code == 1
    assert "the disk is full" in said
    nobody = tmp_path / "nobody.toml"
    nobody.write_text(f"[http]\nport = {free_port()}\n")
    assert check(nobody) == (1, "no answer: [Errno 111] Connection refused\n")


def test_health_check_speaks_tls_with_a_token(tmp_path: Path) -> None:
    made = certificates(tmp_path / "certificates")
    token = tmp_path / "token"
    token.write_text("secret\n")
    token.chmod(0o600)
    tls = dict(zip(("certificate", "key"), map(str, made.server), strict=True))
    with health(tmp_path, (), address="0.0.0.0", token_file=str(token), tls=tls) as config:
        assert check(config)[0] == 0


def compose(name: str = "compose.yaml") -> Any:
    return yaml.safe_load((DOCKER / name).read_text())
