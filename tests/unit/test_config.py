"""appliance.toml: sound ones load, everything else is refused with the dotted path, and secrets stay secret."""

from __future__ import annotations

import configparser
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from dints_deploy.config import Config, load_config
from dints_deploy.config.initial import Answers, initial_text, write_initial
from dints_deploy.config.load import read_token
from dints_deploy.errors import UsageError

UNIT = Path(__file__).parents[2] / "docs" / "systemd" / "dints-deploy.service"


def fields() -> dict[str, Any]:
    """Return the fields of a sound configuration with one of everything."""
    return {
        "schema_version": 1,
        "data_dir": "/var/lib/dints-deploy",
        "listeners": [{"titles": [{"ae_title": "DINTS", "callers": ["MR1", "PACS"], "routes": ["brain"]}]}],
        "folders": [{"path": "/srv/incoming"}],
        "routes": [{"name": "brain", "entry": "hippocampus", "destinations": ["pacs", "web", "files"]}],
        "destinations": [
            {"kind": "dicom", "name": "pacs", "host": "pacs", "port": 104, "ae_title": "PACS",
             "calling_ae_title": "DINTS", "commitment": True},
            {"kind": "stow", "name": "web", "url": "https://pacs/dicom-web"},
            {"kind": "folder", "name": "files", "path": "/srv/results"},
        ],
    }  # fmt: skip


def write(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "appliance.toml"
    path.write_text(tomli_w.dumps(document))
    path.chmod(0o644)
    return path


def change(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Set the field at a dotted path."""
    *way, last = path.split(".")
    here: Any = document
    for step in way:
        here = here[int(step)] if step.isdigit() else here.setdefault(step, {})
    here[last] = value
    return document


def test_a_sound_configuration_loads_and_cannot_be_changed(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, fields()))
    assert config.listeners[0].titles[0].ae_title == "DINTS"
    assert config.http is not None
    assert config.http.address == "127.0.0.1"
    with pytest.raises(ValueError, match="frozen"):
        config.data_dir = Path("/elsewhere")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("colour", "red", "colour: Extra inputs"),
        ("listeners.0.colour", "red", "listeners.0.colour: Extra inputs"),
        ("destinations.0.colour", "red", "destinations.0.dicom.colour: Extra inputs"),
        ("schema_version", 2, "schema_version"),
        ("data_dir", "relative", "data_dir: .*absolute"),
        ("data_dir", "/var/../etc", "data_dir: .*absolute"),
        ("listeners.0.titles.0.ae_title", "A" * 17, r"ae_title: .*1 to 16"),
        ("listeners.0.titles.0.ae_title", "A\\B", r"ae_title: .*backslash"),
        ("listeners.0.titles.0.callers", [], "callers"),
        ("listeners.0.titles.0.addresses", ["10.1.0.0/33"], "addresses"),
        ("listeners.0.titles.0.routes", ["lungs"], "routes: expected names of brain, found lungs"),
        ("listeners.0.port", 0, "listeners.0.port"),
        ("listeners.0.tls", {"authority": "/etc/ca.pem"}, "expected a certificate"),
        ("folders.0.path", "/var/lib/dints-deploy/in", "apart from data_dir"),
        ("folders.0.after", "move", "move_to: expected"),
        ("routes.0.destinations", ["nowhere"], "routes.brain.destinations: expected names of"),
        ("routes", [], "routes"),
        ("destinations.0.kind", "fax", "destinations.0"),
        ("destinations.0.calling_ae_title", "OTHER", "calling_ae_title: expected names of DINTS"),
        ("listeners.0.titles.0.callers", ["MR1"], "callers of DINTS: expected PACS, which reports"),
        ("destinations.1.url", "http://pacs/dicom-web", "url: expected https"),
        ("destinations.1.url", "https://user:secret@pacs", "url"),
        ("destinations.1.name", "pacs", "destinations: expected distinct names"),
        ("http.address", "0.0.0.0", "expected token_file and tls"),
        ("completeness.quiet_seconds", 1, "settled_seconds <= quiet_seconds"),
    ],
)
def test_a_fault_is_named_by_its_dotted_path(path: str, value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        load_config(write(tmp_path, change(fields(), path, value)))
    assert refused.value.code == "config-invalid"
    assert "secret" not in str(refused.value)


def test_a_configuration_that_others_can_change_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, fields())
    path.chmod(0o646)
    with pytest.raises(UsageError, match="chmod 644") as refused:
        load_config(path)
    assert refused.value.code == "config-rights"


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o602])
def test_a_token_that_others_can_read_or_change_is_refused(mode: int, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(mode)
    path = write(tmp_path, change(fields(), "destinations.1.token_file", str(token)))
    with pytest.raises(UsageError, match="chmod 600") as refused:
        load_config(path)
    assert refused.value.code == "config-rights"
    token.chmod(0o600)
    load_config(path)
    assert read_token(token) == "secret"


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_config(tmp_path / "appliance.toml")


@pytest.mark.parametrize(
    "answers",
    [
        Answers(),
        Answers(pacs=("PACS", "10.1.2.3", 104), folder=Path("/srv/incoming"), callers=("MR1", "CT1")),
        Answers(ae_title='QUOTE"S', data_dir=Path('/srv/a "b" c')),
    ],
)
def test_what_init_writes_is_sound_and_says_what_was_answered(answers: Answers, tmp_path: Path) -> None:
    config = write_initial(tmp_path / "appliance.toml", answers)
    assert config == load_config(tmp_path / "appliance.toml")
    assert config.data_dir == answers.data_dir
    assert config.listeners[0].titles[0].callers == tuple(answers.callers)
    assert [folder.path for folder in config.folders] == [answers.folder] * (answers.folder is not None)
    assert config.destinations[0].kind == ("folder" if answers.pacs is None else "dicom")
    with pytest.raises(UsageError, match="config-exists"):
        write_initial(tmp_path / "appliance.toml", answers)


def test_what_init_writes_states_the_defaults_truly(tmp_path: Path) -> None:
    """Where the commented file names a value, it is the model's default: removing the line changes nothing."""
    document = tomllib.loads(initial_text(Answers()))
    for section in ("completeness", "worker", "retention", "disk", "http", "log"):
        stated = document[section]
        field = Config.model_fields[section]
        default = field.default.model_dump(mode="json")
        assert {key: default[key] for key in stated} == stated


def test_answers_that_make_no_sound_configuration_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ae_title"):
        write_initial(tmp_path / "appliance.toml", Answers(ae_title="TOO LONG AN AE TITLE"))
    assert list(tmp_path.iterdir()) == []


def test_the_systemd_unit_runs_the_command_and_is_hardened() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",))
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = dict(unit["Service"])
    assert service["ExecStart"].split()[1:] == ["watch", "--config", "/etc/dints-deploy/appliance.toml"]
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) > 0
    assert service["CapabilityBoundingSet"] == ""
    hardened = [
        "NoNewPrivileges",
        "ProtectHome",
        "PrivateTmp",
        "PrivateDevices",
        "RestrictNamespaces",
        "LockPersonality",
    ]
    assert {key: service[key] for key in hardened} == dict.fromkeys(hardened, "true")
    assert service["ProtectSystem"] == "strict"
