"""Damaged and lying files end in a volume or a reason code; benchmarks/dicom_fuzz.py feeds many more."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.dicom_fuzz import TAGS, run
from dints_deploy.dicom.bounded import Limits
from dints_deploy.dicom.read import read_series
from dints_deploy.dicom.series import collect
from dints_deploy.errors import REASONS, DintsError
from tests.dicom_phantoms import straight, write


def test_three_hundred_altered_series_end_in_a_volume_or_a_code(tmp_path: Path) -> None:
    outcome = run(300, 2024, tmp_path)
    assert outcome.crashes == []
    assert sum(outcome.fates.values()) == 300
    assert outcome.fates["volume"] > 10  # the alterations are not so coarse that nothing is left to read
    assert set(outcome.fates) <= {*REASONS, "volume", "no series"}
    assert outcome.slowest_s < 30


def test_a_crash_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: an exception that is no `DintsError` counts as a crash."""

    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("benchmarks.dicom_fuzz.collect", broken)
    assert len(run(3, 0, tmp_path).crashes) == 3


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tag=st.sampled_from(TAGS), value=st.binary(max_size=40), at=st.integers(0, 2))
def test_any_bytes_in_any_attribute_end_in_a_volume_or_a_code(
    tmp_path_factory: pytest.TempPathFactory, tag: int, value: bytes, at: int
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = write(folder, straight(planes=3))[at]
    data = path.read_bytes()
    start = data.find(struct.pack("<HH", tag >> 16, tag & 0xFFFF))
    if start > 0:
        (size,) = struct.unpack("<H", data[start + 6 : start + 8])
        data = data[: start + 6] + struct.pack("<H", len(value)) + value + data[start + 8 + size :]
        path.write_bytes(data)
    code = "volume"
    try:
        for series in collect(folder).series:
            read_series(series, limits=Limits(stack_bytes=1 << 26))
    except DintsError as error:
        code = error.code
    assert code in (*REASONS, "volume")


def test_sequences_nested_a_hundred_thousand_deep_are_a_code_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, straight(planes=1))[0]
    data = path.read_bytes()
    at = data.find(struct.pack("<HH", 0x0008, 0x0008))
    item = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    path.write_bytes(data[:at] + item * 180_000 + data[at:])  # 3.6 MB
    start = time.perf_counter()
    study = collect(tmp_path)
    assert time.perf_counter() - start < 10
    assert [item.code for item in study.findings] == ["dicom-corrupt"]
