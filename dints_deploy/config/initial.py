"""Write a first `appliance.toml` with comments from a few answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Final

from dints_deploy.config.appliance import Config
from dints_deploy.config.load import load_config
from dints_deploy.errors import UsageError
from dints_deploy.files import make_folder, replacing

TEMPLATE: Final = Path(__file__).with_name("template.toml")

FOLDER: Final = """[[folders]]
path = {path}
settle_seconds = 10    # how long a file must stay as it is before it is taken
after = "leave"        # or "delete", or "move" with move_to
"""

COMMENTED_FOLDER: Final = """# [[folders]]
# path = "/srv/incoming"
# settle_seconds = 10    # how long a file must stay as it is before it is taken
# after = "leave"        # or "delete", or "move" with move_to
"""

PACS: Final = """[[destinations]]
kind = "dicom"
name = "pacs"
host = {host}
port = {port}
ae_title = {ae_title}
calling_ae_title = {calling}
commitment = false    # ask the PACS to commit to keep the results (storage commitment)
"""

RESULTS: Final = """[[destinations]]
kind = "folder"
name = "results"
path = {path}
"""


@dataclass(frozen=True)
class Answers:
    """What a first configuration is made of.

    Attributes:
        callers: AE titles that may send.
        pacs: AE title, host and port of where results go; None for a folder of the data folder.
        folder: watched for files; None for none.
    """

    data_dir: Path = Path("/var/lib/dints-deploy")
    ae_title: str = "DINTS"
    address: str = "0.0.0.0"
    port: int = 11112
    callers: Sequence[str] = ("*",)
    entry: str = "hippocampus"
    pacs: tuple[str, str, int] | None = None
    folder: Path | None = None
    http_port: int = 9113


def initial_text(answers: Answers) -> str:
    """Return the text of a configuration."""
    quote = json.dumps  # a basic string of TOML is a string of JSON
    if answers.pacs is None:
        destination, table = "results", RESULTS.format(path=quote(f"{answers.data_dir}-results"))
    else:
        title, host, port = answers.pacs
        fields = {"host": quote(host), "port": port, "ae_title": quote(title), "calling": quote(answers.ae_title)}
        destination, table = "pacs", PACS.format(**fields)
    folder = COMMENTED_FOLDER if answers.folder is None else FOLDER.format(path=quote(str(answers.folder)))
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        data_dir=quote(str(answers.data_dir)),
        address=quote(answers.address),
        port=answers.port,
        ae_title=quote(answers.ae_title),
        callers=quote(list(answers.callers)),
        entry=quote(answers.entry),
        destination=quote(destination),
        destination_table=table,
        folder=folder,
        http_port=answers.http_port,
    )


def write_initial(path: Path, answers: Answers) -> Config:
    """Write a configuration that only its owner can change, once it is known to be sound.

    Raises:
        UsageError: `config-exists`, or `config-invalid` where the answers make no sound configuration.
        OutputError: it cannot be written.
    """
    if path.exists():
        raise UsageError("config-exists", f"expected no file at {path}, found one: choose another, or move it away")
    make_folder(path.parent)
    with replacing(path) as partial:
        partial.touch(mode=0o640)
        partial.write_text(initial_text(answers), encoding="utf-8")
        return load_config(partial)
