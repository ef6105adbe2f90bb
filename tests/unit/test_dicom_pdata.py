"""P-DATA and the commands of C-STORE are read and written as pynetdicom reads and writes them."""

from __future__ import annotations

import struct
from io import BytesIO
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import UID
from pynetdicom.dimse_messages import C_ECHO_RQ, C_STORE_RQ, C_STORE_RSP, N_EVENT_REPORT_RQ, DIMSEMessage
from pynetdicom.dimse_primitives import C_ECHO, C_STORE, N_EVENT_REPORT
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.pdu_primitives import P_DATA

from dints_deploy.dicom.pdata import fragments
from dints_deploy.dicom.storing import Request, store_answer, store_request

VALUES = st.lists(
    st.tuples(st.integers(0, 127).map(lambda n: 2 * n + 1), st.binary(min_size=1, max_size=40)), min_size=1, max_size=6
)
UIDS = st.lists(st.integers(0, 99999), min_size=2, max_size=8).map(lambda parts: "1." + ".".join(map(str, parts)))


def pdu(values: list[tuple[int, bytes]]) -> bytes:
    """Return what pynetdicom sends."""
    primitive = P_DATA()
    primitive.presentation_data_value_list = [list(value) for value in values]
    encoded: bytes = P_DATA_TF(primitive).encode()
    return encoded


def command_of(message: DIMSEMessage, primitive: object) -> bytes:
    """Return the command set that pynetdicom sends for a primitive."""
    message.primitive_to_message(primitive)
    first = next(iter(message.encode_msg(1, 0)))
    ((_, data),) = first.presentation_data_value_list
    return bytes(data[1:])


@given(VALUES)
def test_the_fragments_of_a_pdu_come_out_as_they_went_in(values: list[tuple[int, bytes]]) -> None:
    found = fragments(memoryview(pdu(values))[6:])
    assert [(context, bytes(fragment)) for context, fragment in found] == values


@given(VALUES, st.data())
def test_a_pdu_whose_lengths_do_not_add_up_is_named_so_and_never_read_beyond(
    values: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    body = bytearray(pdu(values)[6:])
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(0, len(body)))]
    read = 0
    try:
        for _, fragment in fragments(memoryview(body)):
            assert len(fragment) >= 1
            read += 5 + len(fragment)
        assert read == len(body)
    except ValueError:
        assert read < len(body)


@given(UIDS, UIDS, st.integers(0, 65535))
def test_a_request_to_store_is_read_as_pynetdicom_writes_it(sop_class: str, instance: str, number: int) -> None:
    primitive = C_STORE()
    primitive.MessageID, primitive.Priority = number, 2
    primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = UID(sop_class), UID(instance)
    primitive.DataSet = BytesIO(b"\0\0")
    assert store_request(command_of(C_STORE_RQ(), primitive)) == Request(sop_class, instance, number)


@given(UIDS, UIDS, st.integers(0, 65535), st.sampled_from([0x0000, 0xA700, 0xA900, 0xC000, 0x0110]))
def test_an_answer_is_read_by_pynetdicom_as_it_was_meant(
    sop_class: str, instance: str, number: int, status: int
) -> None:
    raw = store_answer(5, Request(sop_class, instance, number), status)
    read = P_DATA_TF()
    read.decode(raw)
    message = DIMSEMessage()
    assert message.decode_msg(read.to_primitive(), SimpleNamespace(_accepted_cx={}))
    assert isinstance(message, C_STORE_RSP)
    answer = message.message_to_primitive()
    assert (answer.AffectedSOPClassUID, answer.AffectedSOPInstanceUID) == (sop_class, instance)
    assert (answer.MessageIDBeingRespondedTo, answer.Status, message.context_id) == (number, status, 5)
    assert raw == store_answer(5, Request(sop_class, instance, number), status)


def test_other_commands_are_left_to_the_library() -> None:
    echo, report = C_ECHO(), N_EVENT_REPORT()
    echo.MessageID = report.MessageID = 1
    report.AffectedSOPClassUID = report.AffectedSOPInstanceUID = UID("1.2.840.10008.1.20.1")
    report.EventTypeID = 1
    for message, primitive in ((C_ECHO_RQ(), echo), (N_EVENT_REPORT_RQ(), report)):
        assert store_request(command_of(message, primitive)) is None


@given(st.binary(max_size=200))
def test_no_bytes_make_the_reading_of_a_command_fail(command: bytes) -> None:
    found = store_request(command)
    assert found is None or isinstance(found, Request)


def test_a_request_without_a_data_set_or_cut_short_is_none() -> None:
    whole = b"".join(
        struct.pack("<HHL", 0, element, 2) + struct.pack("<H", value)
        for element, value in ((0x0100, 1), (0x0110, 7), (0x0800, 0))
    )
    assert store_request(whole) == Request("", "", 7)
    assert store_request(whole[:-1]) is None
    assert store_request(whole[:-2] + b"\x01\x01") is None


def test_an_item_without_a_control_header_is_refused() -> None:
    with pytest.raises(ValueError, match="another length"):
        list(fragments(memoryview(struct.pack(">LB", 1, 1) + b"\0")))
