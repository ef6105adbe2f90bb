"""The pictures show the mask where it is, in its colour, in the source's own slices, without a name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dints_deploy.dicom.capture import GAP, LINE, TILE, key_slices, render, side, write_sc
from dints_deploy.dicom.result import DicomResult
from tests.dicom_phantoms import MARK, straight, write
from tests.dicom_results import ENTRY, read_object, result_of, volume_of


def result_with(mask_at: tuple[slice, slice, slice] | None, folder: Path) -> DicomResult:
    phantom = straight(planes=9, rows=20, columns=40, between_rows=2.0)
    write(folder / "in", replace(phantom, pixels=np.full_like(phantom.pixels, 100) + np.arange(40, dtype=np.uint16)))
    volume = volume_of(folder / "in")
    mask = np.zeros(volume.volume.shape, dtype=np.uint8)
    if mask_at:
        mask[mask_at] = 2
    return result_of(volume, mask)


def is_blue(sheet: NDArray[np.uint8]) -> NDArray[np.bool_]:
    blue: NDArray[np.bool_] = (sheet == np.array(ENTRY.labels[1].colour, dtype=np.uint8)).all(axis=-1)
    return blue


def test_the_mask_is_drawn_where_it_is_on_the_right_slices(tmp_path: Path) -> None:
    result = result_with((slice(30, 36), slice(2, 6), slice(3, 5)), tmp_path)
    assert key_slices(result) == [3, 4]
    sheet = render(result)
    tile = is_blue(sheet[GAP + LINE : GAP + LINE + TILE, GAP : GAP + TILE])  # square: 20 rows of 2 mm, 40 columns of 1
    rows, columns = np.nonzero(tile)
    assert (rows.min() / TILE * 20, (rows.max() + 1) / TILE * 20) == (2.0, 6.0)
    assert (columns.min() / TILE * 40, (columns.max() + 1) / TILE * 40) == (30.0, 36.0)


def test_key_slices_hold_the_fullest_and_at_most_six(tmp_path: Path) -> None:
    result = result_with((slice(3, 5), slice(2, 6), slice(0, 9)), tmp_path)
    segments = result.segments.copy()
    segments[7, :, 20:] = 2
    chosen = key_slices(replace(result, segments=segments))
    assert len(chosen) == 6
    assert 7 in chosen
    assert chosen == sorted(set(chosen))


def test_a_picture_is_a_derived_colour_image_of_the_patient_and_says_research_use(tmp_path: Path) -> None:
    result = result_with((slice(30, 36), slice(2, 6), slice(3, 5)), tmp_path)
    picture = read_object(write_sc(result, tmp_path / "sc.dcm"))
    np.testing.assert_array_equal(picture.pixel_array, render(result))
    assert (picture.PhotometricInterpretation, picture.BurnedInAnnotation) == ("RGB", "NO")
    assert str(picture.PatientName) == MARK
    assert "esearch use only" in picture.ImageComments
    amber = (picture.pixel_array[-2 * LINE :] == (255, 190, 90)).all(axis=-1)
    assert amber.sum() > 200  # the line is drawn, too
    sources = [read_object(tmp_path / "in" / f"{place:04d}.dcm").SOPInstanceUID for place in (3, 4)]
    assert [item.ReferencedSOPInstanceUID for item in picture.SourceImageSequence] == sources


def test_an_empty_mask_shows_the_slices_without_colour(tmp_path: Path) -> None:
    result = result_with(None, tmp_path)
    sheet = render(result)
    height = 2 * (TILE + LINE + GAP)
    assert not is_blue(sheet[:height]).any()
    assert is_blue(sheet[height:]).any()  # the legend
    assert read_object(write_sc(result, tmp_path / "sc.dcm")).Modality == "OT"


@pytest.mark.parametrize(
    ("direction", "start", "letter"),
    [((1, 0, 0), True, "R"), ((1, 0, 0), False, "L"), ((-1, 0, 0), True, "L"), ((0, 1, 0), True, "A"),
     ((0, 0, -1), True, "H"), ((0.1, -0.2, 0.9), False, "H"), ((0, -1, 0.2), True, "P")],
)  # fmt: skip
def test_letters_name_the_side_that_a_direction_in_lps_comes_from(
    direction: tuple[float, ...], start: bool, letter: str
) -> None:
    """A row towards +x (left) begins at the patient's right (PS3.3 C.7.6.1.1.1)."""
    assert side(direction, start=start) == letter
