"""Every reason has a code, and a Fault survives the trip through google.rpc.Status."""

import pytest
from conveyor_proto.reasons import CODES, DOMAIN, Fault, from_status, to_status
from conveyor_proto.v1 import errors_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

REASONS = [value for value in errors_pb2.ErrorReason.values() if value != errors_pb2.ERROR_REASON_UNSPECIFIED]


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_has_a_code_and_travels(reason):
    assert CODES[reason] != code_pb2.OK
    fault = Fault(reason, "what to do", {"session_id": "s"}, retry_s=1.25)
    status = status_pb2.Status.FromString(to_status(fault).SerializeToString())
    assert status.code == CODES[reason]
    assert from_status(status) == fault


def test_the_contract_names_the_code_that_is_sent():
    """errors.proto documents each reason's code in a comment above it; the table must say the same."""
    from pathlib import Path

    lines = Path("proto/conveyor/v1/errors.proto").read_text().splitlines()
    codes = set(code_pb2.Code.keys())
    current, checked = None, 0
    for line in map(str.strip, lines):
        if line.startswith("//"):
            word = line[2:].strip().split(".")[0].split(" ")[0]
            current = word if word in codes else current
        elif line.startswith("ERROR_REASON_") and "UNSPECIFIED" not in line:
            name = line.split(" ")[0]
            assert code_pb2.Code.Name(CODES[errors_pb2.ErrorReason.Value(name)]) == current, name
            checked += 1
    assert checked == len(REASONS)


def test_error_info_is_always_there():
    status = to_status(Fault(errors_pb2.ERROR_REASON_STEP_GAP, "m", {"next_seq": "3"}))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain, info.metadata["next_seq"]) == ("STEP_GAP", DOMAIN, "3")
    assert len(status.details) == 1


def test_a_status_from_elsewhere_keeps_its_message():
    fault = from_status(status_pb2.Status(code=code_pb2.UNAVAILABLE, message="proxy says no"))
    assert fault.reason == errors_pb2.ERROR_REASON_UNSPECIFIED
    assert fault.message == "proxy says no"


def test_a_reason_of_a_newer_server_keeps_its_name():
    status = to_status(Fault(errors_pb2.ERROR_REASON_STEP_GAP, "m"))
    info = error_details_pb2.ErrorInfo(reason="BRAND_NEW", domain=DOMAIN)
    status.details[0].Pack(info)
    fault = from_status(status)
    assert fault.reason == errors_pb2.ERROR_REASON_UNSPECIFIED
    assert fault.metadata["reason"] == "BRAND_NEW"
