"""The conformance statement says what a running port negotiates: every class and syntax of its tables, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import JPEG2000Lossless, RLELossless
from pynetdicom import AE, AllStoragePresentationContexts, StoragePresentationContexts
from pynetdicom.sop_class import (
    CTImageStorage,
    ModalityWorklistInformationFind,
    PatientRootQueryRetrieveInformationModelMove,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    Verification,
)

from dints_deploy.dicom.objects import NUMBERS
from dints_deploy.dicom.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dints_deploy.dicom.verify import KINDS
from tests.receiving import OURS, Appliance, receiving

PAGE = (Path(__file__).parents[2] / "docs" / "dicom-conformance.md").read_text(encoding="utf-8")
EXPLICIT = "1.2.840.10008.1.2.1"
"""A transfer syntax that every port takes."""

CONTEXTS = 126
"""In one association at most 128 (PS3.8 9.3.2.2)."""


def table(heading: str) -> list[str]:
    """Return the UIDs of the table below a heading."""
    return re.findall(r"^\|.*\| `([0-9.]+)` \|$", PAGE.split(f"### {heading}\n")[1].split("\n#")[0], re.MULTILINE)


def in_parts(items: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    for first in range(0, len(items), most):
        yield items[first : first + most]


def negotiate(port: int, contexts: list[tuple[str, list[str]]]) -> list[tuple[str, str]]:
    """Propose contexts and return those that were accepted: class and transfer syntax."""
    entity = AE("MR1")
    for abstract, syntaxes in contexts:
        entity.add_requested_context(abstract, syntaxes)
    association: Any = entity.associate("127.0.0.1", port, ae_title=OURS)
    if not association.is_established:
        return []
    acceptor = association.acceptor
    assert acceptor.implementation_class_uid == IMPLEMENTATION_CLASS_UID
    assert acceptor.implementation_version_name == IMPLEMENTATION_VERSION_NAME
    accepted = [(str(one.abstract_syntax), str(one.transfer_syntax[0])) for one in association.accepted_contexts]
    association.release()
    return accepted


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with receiving(tmp_path_factory.mktemp("port")) as appliance:
        yield appliance


def test_classes_of_the_statement_are_those_that_are_accepted(port: Appliance) -> None:
    known = {str(one.abstract_syntax) for one in [*AllStoragePresentationContexts, *StoragePresentationContexts]}
    asked = sorted({Verification, *known, *table("Storage classes")})
    accepted: list[str] = []
    for some in in_parts(asked, CONTEXTS):
        accepted += [abstract for abstract, _ in negotiate(port.port, [(uid, [EXPLICIT]) for uid in some])]
    assert len(accepted) > 150
    assert set(accepted) == {Verification, *table("Storage classes")}


def test_every_syntax_of_the_statement_is_accepted_in_the_senders_order(port: Appliance) -> None:
    syntaxes = table("Transfer syntaxes")
    accepted = negotiate(port.port, [(CTImageStorage, [uid]) for uid in syntaxes])
    assert accepted == [(CTImageStorage, uid) for uid in syntaxes]
    for order in ([RLELossless, JPEG2000Lossless, EXPLICIT], [JPEG2000Lossless, EXPLICIT, RLELossless]):
        assert negotiate(port.port, [(CTImageStorage, order)]) == [(CTImageStorage, order[0])]


def test_what_the_statement_says_is_not_provided_is_rejected(port: Appliance) -> None:
    services = (
        ModalityWorklistInformationFind,
        PatientRootQueryRetrieveInformationModelMove,
        StudyRootQueryRetrieveInformationModelFind,
        StudyRootQueryRetrieveInformationModelGet,
    )
    private_class, private_syntax = "1.2.826.0.1.3680043.9.9999.1", "1.2.826.0.1.3680043.9.9999.2"
    asked = [(uid, [EXPLICIT]) for uid in (*services, private_class)]
    asked += [(CTImageStorage, [private_syntax]), (Verification, [EXPLICIT])]
    assert negotiate(port.port, asked) == [(Verification, EXPLICIT)]


def test_result_classes_and_identity_are_the_codes() -> None:
    said = PAGE.split("## The entity as user")[1]
    assert set(re.findall(r"\| `([0-9.]+)` \|", said)) == set(KINDS)
    assert len(NUMBERS) == len({kind for kind, _ in KINDS.values()})
    assert f"| Implementation Class UID | `{IMPLEMENTATION_CLASS_UID}` |" in PAGE
    assert f"| Implementation Version Name | `{IMPLEMENTATION_VERSION_NAME}` |" in PAGE
