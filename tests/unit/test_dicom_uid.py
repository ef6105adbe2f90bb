"""UIDs and digests follow from content, and provenance survives its way through an object."""

from __future__ import annotations

import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRBigEndian, ImplicitVRLittleEndian

from dints_deploy.dicom.findings import Action, Policy
from dints_deploy.dicom.provenance import Provenance, equipment, input_digest, mask_digest, read_provenance
from dints_deploy.dicom.read import read_series
from dints_deploy.dicom.series import collect
from dints_deploy.dicom.uid import derived_uid
from tests.dicom_phantoms import straight, write
from tests.dicom_results import volume_of


def test_a_derived_uid_is_a_version_8_uuid_that_never_changes() -> None:
    uid = derived_uid("entry", "fp32")
    assert uid == "2.25.147749437362742505456419858636048865801"
    number = uuid.UUID(int=int(uid.removeprefix("2.25.")))
    assert (number.version, number.variant) == (8, uuid.RFC_4122)
    assert UID(uid).is_valid


@given(st.lists(st.text(max_size=4), max_size=4), st.lists(st.text(max_size=4), max_size=4))
def test_different_parts_give_different_uids(one: list[str], other: list[str]) -> None:
    assert (derived_uid(*one) == derived_uid(*other)) == (one == other)


def test_provenance_of_many_members_comes_back_from_short_texts() -> None:
    weights = tuple(f"{number:064x}" for number in range(40))
    provenance = Provenance("entry", "1.0.0", "g" * 64, weights, "onnx 1.20", "fp32", ("i" * 64,), "m" * 64, "0.1.0")
    written = Dataset()
    written.ContributingEquipmentSequence = equipment(provenance, content="c" * 64)
    assert len(written.ContributingEquipmentSequence) > 2
    assert all(len(str(item.ContributionDescription)) <= 1024 for item in written.ContributingEquipmentSequence)
    assert read_provenance(written) == provenance
    assert read_provenance(Dataset()) is None


def test_every_field_of_the_provenance_is_part_of_the_identity() -> None:
    full = Provenance("e", "1", "g", ("w",), "onnx", "fp32", ("i",), "m", "s")
    changes = {"entry": "x", "version": "x", "genotype": "x", "weights": ("w", "x"), "engine": "x", "precision": "x"}
    changes |= {"input": ("x",), "mask": "x", "software": "x"}
    others = [replace(full, **{key: value}) for key, value in changes.items()]  # type: ignore[arg-type]
    assert len({one.identity for one in [full, *others]}) == len(changes) + 1


def test_the_input_digest_names_pixels_and_places_not_files(tmp_path: Path) -> None:
    phantom = straight(planes=4)
    write(tmp_path / "a", phantom)
    write(tmp_path / "b", phantom, order=[3, 1, 0, 2], syntax=ImplicitVRLittleEndian)
    write(tmp_path / "c", phantom, syntax=ExplicitVRBigEndian)
    same = {input_digest(volume_of(tmp_path / name)) for name in ("a", "b", "c")}
    assert len(same) == 1

    brighter = replace(phantom, pixels=phantom.pixels + np.eye(4, 42, dtype=np.uint16).reshape(4, 6, 7))
    write(tmp_path / "d", brighter)
    moved = replace(phantom, positions=phantom.positions + np.array([0.0, 0.0, 0.5]))
    write(tmp_path / "e", moved)
    wider = replace(phantom, between_columns=1.5)
    write(tmp_path / "f", wider)
    others = {input_digest(volume_of(tmp_path / name)) for name in ("d", "e", "f")}
    assert len(others | same) == 4


def test_the_input_digest_does_not_depend_on_what_was_regularised(tmp_path: Path) -> None:
    upright = straight(planes=5)
    write(tmp_path, replace(upright, positions=upright.positions + np.arange(5)[:, np.newaxis] * [0.0, 0.7, 0.0]))
    (series,) = collect(tmp_path).series
    accepted = read_series(series, policy=Policy({"dicom-tilt": Action.ACCEPT}))
    regularised = read_series(series, policy=Policy({"dicom-tilt": Action.REGULARISE}))
    assert regularised.regularised
    assert not accepted.regularised
    assert input_digest(accepted) == input_digest(regularised)


def test_a_run_without_dicom_outputs_does_not_pay_for_their_libraries() -> None:
    """highdicom alone costs more than a second."""
    modules = [
        "seg",
        "measure",
        "rtstruct",
        "capture",
        "refusal",
        "verify",
        "result",
        "objects",
        "selfcheck",
        "contour",
    ]
    code = "".join(f"import dints_deploy.dicom.{module}\n" for module in modules)
    code += "import sys; print([name for name in ('highdicom', 'contourpy', 'torch') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.strip() == "[]"


def test_the_mask_digest_ignores_order_and_empty_planes_and_sees_one_pixel() -> None:
    plane = np.zeros((3, 4), dtype=np.uint8)
    plane[1, 2] = 2
    empty = np.zeros_like(plane)
    digest = mask_digest([("1.2", 0, plane), ("1.3", 1, plane)])
    assert digest == mask_digest([("1.3", 1, plane.astype(np.uint16)), ("1.4", 0, empty), ("1.2", 0, plane)])
    other = plane.copy()
    other[1, 2] = 1
    assert digest != mask_digest([("1.2", 0, other), ("1.3", 1, plane)])
    assert digest != mask_digest([("1.2", 0, plane), ("1.3", 0, plane)])
