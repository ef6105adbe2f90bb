"""The geometry gate names what is wrong with a stack, and which slices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dints_deploy.dicom.findings import KINDS, REGULARISING, STRICT, Action, Policy, Severity, finding
from dints_deploy.dicom.gate import GeometryReport, decide, examine
from dints_deploy.dicom.header import PixelLayout, SliceHeader
from dints_deploy.dicom.regular import regular_grid
from dints_deploy.errors import REASONS, ScanRefused, UsageError

LAYOUT = PixelLayout(
    "1.2.840.10008.1.2.1",
    Rows=64,
    Columns=48,
    BitsAllocated=16,
    BitsStored=16,
    HighBit=15,
    PhotometricInterpretation="MONOCHROME2",
    vr="OW",
    length=64 * 48 * 2,
    available=64 * 48 * 2,
)
CT = "1.2.840.10008.5.1.4.1.1.2"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def header(z: float, number: int = 1, **changes: Any) -> SliceHeader:
    """Return an axial CT slice at a height."""
    plain = SliceHeader(
        Path(f"{number}.dcm"),
        0,
        LAYOUT,
        f"1.2.{number}",
        CT,
        Modality="CT",
        InstanceNumber=number,
        FrameOfReferenceUID="1.9",
        ImageType=("ORIGINAL", "PRIMARY", "AXIAL"),
        ImageOrientationPatient=AXIAL,
        ImagePositionPatient=(-10.0, -20.0, z),
        PixelSpacing=(0.5, 0.5),
        RescaleSlope=1.0,
        RescaleIntercept=-1024.0,
    )
    return replace(plain, **changes)


def stack(*heights: float) -> list[SliceHeader]:
    return [header(z, number) for number, z in enumerate(heights, 1)]


def codes(report: GeometryReport) -> list[str]:
    return [item.code for item in report.findings]


def slices_of(report: GeometryReport, code: str) -> tuple[int, ...]:
    (found,) = (item for item in report.findings if item.code == code)
    return found.slices


def with_layout(**changes: Any) -> list[SliceHeader]:
    """Return an even stack whose last slice has another layout."""
    slices = stack(0, 1, 2, 3)
    return [*slices[:3], replace(slices[3], layout=replace(LAYOUT, **changes))]


def with_last(**changes: Any) -> list[SliceHeader]:
    """Return an even stack whose last slice is changed."""
    slices = stack(0, 1, 2, 3)
    return [*slices[:3], replace(slices[3], **changes)]


def test_an_even_stack_has_no_findings_and_its_exact_grid() -> None:
    report = examine(stack(7, 1, 4, 10))
    assert codes(report) == []
    assert [plane.header.InstanceNumber for plane in report.planes] == [2, 3, 1, 4]
    assert list(report.positions) == [0.0, 3.0, 6.0, 9.0]
    assert (report.step, report.tilt, report.orientation) == (3.0, 0.0, "axial")
    assert report.grid is not None
    expected = [[-0.5, 0, 0, 10], [0, -0.5, 0, 20], [0, 0, 3, 1], [0, 0, 0, 1]]
    np.testing.assert_array_equal(report.grid.affine, expected)
    assert report.grid.shape == (48, 64, 4)


def test_rows_and_columns_of_the_spacing_are_not_swapped() -> None:
    """PixelSpacing is between rows first: it belongs to the column direction (PS3.3 10.7.1.3)."""
    report = examine([replace(one, PixelSpacing=(0.7, 0.3)) for one in stack(0, 1, 2)])
    assert report.grid is not None
    assert report.grid.spacing == pytest.approx((0.3, 0.7, 1.0))
    assert codes(report) == ["dicom-non-square"]


MIXED_IN_LAST = {
    "dicom-mixed-matrix": with_layout(Rows=65),
    "dicom-mixed-orientation": with_last(ImageOrientationPatient=(1.0, 0.0, 0.0, 0.0, 0.999, 0.0447)),
    "dicom-mixed-spacing": with_last(PixelSpacing=(0.5, 0.51)),
    "dicom-mixed-frame": with_last(FrameOfReferenceUID="1.8"),
    "dicom-position": with_last(ImagePositionPatient=None),
    "dicom-orientation": with_last(ImageOrientationPatient=(1.0, 0.0, 0.0, 0.5, 0.9, 0.0)),
    "dicom-spacing": with_last(PixelSpacing=(0.5, 0.0)),
    "dicom-localizer": with_last(ImageType=("ORIGINAL", "PRIMARY", "LOCALIZER")),
    "dicom-mosaic": with_last(ImageType=("ORIGINAL", "PRIMARY", "M", "MOSAIC")),
    "dicom-photometric": with_layout(PhotometricInterpretation="RGB", SamplesPerPixel=3),
    "dicom-monochrome1": with_layout(PhotometricInterpretation="MONOCHROME1"),
    "dicom-rescale": with_last(RescaleSlope=0.0),
    "dicom-rescale-type": with_last(RescaleType="MGML"),
    "dicom-modality-lut": with_last(modality_lut=True),
    "dicom-excess-pixels": with_layout(length=64 * 48 * 2 + 2),
    "dicom-attribute": with_last(invalid=("PixelPaddingValue",)),
}


@pytest.mark.parametrize("code", sorted(MIXED_IN_LAST))
def test_one_bad_slice_is_named_and_refused(code: str) -> None:
    report = examine(MIXED_IN_LAST[code])
    assert slices_of(report, code) == (3,)
    with pytest.raises(ScanRefused) as refused:
        decide([item for item in report.findings if item.code == code], STRICT, "abc")
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("code", "slices"),
    [
        ("dicom-lossy", with_last(lossy=True)),
        ("dicom-padding", with_last(PixelPaddingValue=-2000)),
        ("dicom-rescale-varies", with_last(RescaleSlope=2.0)),
        ("dicom-mixed-bits", with_layout(PixelRepresentation=1)),
        ("dicom-instance-gap", with_last(InstanceNumber=9)),
        ("dicom-slice-gap", [replace(one, SliceThickness=5.0) for one in stack(0, 1, 2)]),
        ("dicom-tilt-tag", [replace(one, GantryDetectorTilt=-7.0) for one in stack(0, 1, 2)]),
    ],
)
def test_what_is_only_remarkable_still_gives_a_grid(code: str, slices: list[SliceHeader]) -> None:
    report = examine(slices)
    assert codes(report) == [code]
    assert report.grid is not None
    assert decide(report.findings, STRICT, "abc") == frozenset()
    with pytest.raises(ScanRefused):
        decide(report.findings, Policy({code: Action.REFUSE}), "abc")


def test_a_ct_without_rescale_is_refused_and_an_mr_is_not() -> None:
    plain = [replace(one, RescaleSlope=None, RescaleIntercept=None) for one in stack(0, 1, 2)]
    assert codes(examine(plain)) == ["dicom-rescale"]
    assert codes(examine([replace(one, SOPClassUID="1.2.840.10008.5.1.4.1.1.4") for one in plain])) == []


@pytest.mark.parametrize("kind", ["HU", "HU_MOD", "US"])
def test_a_map_of_another_quantity_is_refused_unless_it_is_no_ct(kind: str) -> None:
    assert codes(examine([replace(one, RescaleType=kind) for one in stack(0, 1, 2)])) == []
    iodine = [replace(one, RescaleType="MGML") for one in stack(0, 1, 2)]
    assert codes(examine(iodine)) == ["dicom-rescale-type"]
    assert codes(examine([replace(one, SOPClassUID="1.2.840.10008.5.1.4.1.1.4") for one in iodine])) == []


def test_a_missing_slice_is_named_with_its_neighbours() -> None:
    report = examine(stack(0, 5, 10, 20, 25, 40))
    assert codes(report) == ["dicom-missing-slice"]
    assert slices_of(report, "dicom-missing-slice") == (2, 3, 4, 5)
    message = report.findings[0].message
    assert "3 missing" in message
    assert "1 between slice 2 (number 3) and slice 3 (number 4); 2 between slice 4" in message
    assert report.grid is None
    assert report.step == pytest.approx(5.0)
    assert regular_grid(report).shape == (48, 64, 9)


def test_uneven_steps_are_named_and_the_smallest_becomes_the_regular_one() -> None:
    report = examine(stack(0, 4, 8, 9.1, 16.1))
    assert codes(report) == ["dicom-uneven-steps"]
    assert "1.1, 4, 7 mm" in report.findings[0].message
    assert (report.step, report.grid) == (None, None)
    assert regular_grid(report).spacing[2] == pytest.approx(1.1)


def test_positions_rounded_to_a_tenth_are_even_and_twice_that_is_not() -> None:
    exact = np.arange(20) * 1.25
    assert codes(examine(stack(*np.round(exact, 1)))) == []
    crooked = exact.copy()
    crooked[7] += 0.2
    assert codes(examine(stack(*crooked))) == ["dicom-uneven-steps"]


def test_a_small_error_of_every_step_does_not_add_up_unseen() -> None:
    """Steps that each differ little can still put the middle of the stack far from its even place."""
    heights = np.cumsum(np.linspace(0.96, 1.04, 100))
    assert codes(examine(stack(*heights))) == ["dicom-uneven-steps"]


@pytest.mark.parametrize(
    ("heights", "code"),
    [
        ((0, 1, 1, 2, 3), "dicom-duplicate-position"),
        ((0, 1, 1.001, 2, 3), "dicom-duplicate-position"),
        ((0, 1, 2, 0, 1, 2), "dicom-several-volumes"),
        ((5, 5, 5, 5), "dicom-duplicate-position"),
    ],
)
def test_planes_at_one_place_are_named(heights: tuple[float, ...], code: str) -> None:
    assert codes(examine(stack(*heights))) == [code]


def test_the_volumes_of_a_series_are_told_apart_by_what_differs() -> None:
    slices = stack(0, 1, 2, 0, 1, 2)
    slices = [replace(one, volume_of=(("EchoTime", str(1 + index // 3)),)) for index, one in enumerate(slices)]
    report = examine(slices)
    assert "2 planes at each of 3 places (they differ in EchoTime)" in report.findings[0].message


def test_tilt_is_measured_from_positions_and_keeps_its_exact_sheared_grid() -> None:
    slices = [replace(header(z, n), ImagePositionPatient=(0.0, 0.25 * z, z)) for n, z in enumerate((0, 4, 8, 12), 1)]
    report = examine(slices)
    assert codes(report) == ["dicom-tilt"]
    assert report.tilt == pytest.approx(np.degrees(np.arctan(0.25)))
    assert report.grid is not None
    np.testing.assert_allclose(report.grid.affine[:3, 2], [0, -1, 4])
    assert regular_grid(report).shape == (48, 64 + 6, 4)  # 3 mm of lean are 6 rows of 0.5 mm


def test_slices_shifted_without_a_common_direction_are_skewed() -> None:
    slices = [replace(header(n, n), ImagePositionPatient=(0.0, (-1.0) ** n, n)) for n in range(6)]
    report = examine(slices)
    assert codes(report) == ["dicom-skew"]
    assert report.grid is None


def test_drift_below_a_tenth_of_a_millimetre_is_kept_in_the_affine_without_a_finding() -> None:
    slices = [replace(header(n, n), ImagePositionPatient=(0.0, 0.01 * n, n)) for n in range(9)]
    report = examine(slices)
    assert codes(report) == []
    assert report.grid is not None
    np.testing.assert_allclose(report.grid.affine[:3, 2], [0, -0.01, 1])


def test_too_few_slices_depend_on_the_policy() -> None:
    assert codes(examine(stack(0, 1))) == ["dicom-too-few-slices"]
    assert codes(examine(stack(0, 1), policy=Policy(minimum_slices=2))) == []
    single = [replace(header(3.0), SliceThickness=4.0)]
    report = examine(single, policy=Policy(minimum_slices=1))
    assert report.grid is not None
    assert report.grid.spacing == (0.5, 0.5, 4.0)
    bare = examine([header(3.0)], policy=Policy(minimum_slices=1))
    assert bare.grid is None
    with pytest.raises(ScanRefused, match="dicom-attribute"):
        regular_grid(bare)


def test_nothing_is_no_volume() -> None:
    assert codes(examine([])) == ["dicom-no-images"]


def test_impossible_numbers_are_findings_not_crashes() -> None:
    for changes in (
        {"ImagePositionPatient": (0.0, 0.0, 1e300)},
        {"ImageOrientationPatient": (1e200, 0.0, 0.0, 0.0, 1.0, 0.0)},
        {"PixelSpacing": (1e300, 1e-300)},
        {"RescaleSlope": 1e300},
    ):
        report = examine(with_last(**changes))
        with pytest.raises(ScanRefused):
            decide(report.findings, REGULARISING, "abc")


def test_every_kind_is_a_reason_and_its_default_is_allowed() -> None:
    assert set(KINDS) <= set(REASONS)
    for code, kind in KINDS.items():
        assert kind.default in kind.allowed, code
        assert (kind.default is Action.REFUSE) == (kind.severity is Severity.REFUSAL), code


def test_a_policy_may_not_stretch_a_volume_silently() -> None:
    for code in ("dicom-uneven-steps", "dicom-missing-slice", "dicom-mixed-spacing", "dicom-duplicate-position"):
        with pytest.raises(UsageError, match="expected one of"):
            Policy({code: Action.ACCEPT})
    with pytest.raises(UsageError, match="expected a DICOM finding"):
        Policy({"dicom-nonsense": Action.ACCEPT})


def test_a_refusal_counts_the_other_reasons_and_regularising_names_what_to_do() -> None:
    findings = [finding("dicom-uneven-steps", "uneven"), finding("dicom-tilt", "tilted")]
    with pytest.raises(ScanRefused, match=r"series abc: uneven \(also refused: dicom-tilt\)"):
        decide(findings, STRICT, "abc")
    assert decide(findings, REGULARISING, "abc") == {"dicom-uneven-steps", "dicom-tilt"}
