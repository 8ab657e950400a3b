"""Each reason has its class, on every path that an error can take."""

import grpc
import pytest
from conveyor import errors
from conveyor._core.retry import Backoff, RetryPolicy, is_cut
from conveyor_proto.reasons import CODES, Fault, to_status
from conveyor_proto.v1 import errors_pb2 as e
from google.rpc import error_details_pb2

REASONS = [reason for reason in e.ErrorReason.values() if reason != e.ERROR_REASON_UNSPECIFIED]
INPUT = [reason for reason in REASONS if e.ErrorReason.Name(reason).startswith("ERROR_REASON_INPUT_")]


@pytest.mark.parametrize("reason", REASONS, ids=e.ErrorReason.Name)
def test_every_reason_has_a_class_of_its_own_family(reason):
    fault = Fault(reason, "a sentence", {"key": "value"}, retry_s=1.5)
    error = errors.from_rpc_status(to_status(fault))
    assert type(error) is not errors.ConveyorError
    assert str(error) == "a sentence"
    assert error.reason == fault.reason_name
    assert error.code.value[0] == CODES[reason]
    assert error.metadata == {"key": "value"}
    assert error.retry_s == 1.5


def test_no_two_families_share_a_class():
    shared = {e.ERROR_REASON_FRAME_INVALID, e.ERROR_REASON_HANDLE_UNKNOWN, e.ERROR_REASON_HANDLE_IN_USE}
    # Of another protocol, which the SDK does not speak.
    foreign = {e.ERROR_REASON_SEQUENCE_INVALID, e.ERROR_REASON_OUTPUT_UNKNOWN, e.ERROR_REASON_NOT_OFFERED}
    alone = [reason for reason in REASONS if reason not in {*INPUT, *shared, *foreign}]
    classes = [type(errors.from_fault(Fault(reason, ""))) for reason in alone]
    assert len(set(classes)) == len(classes)
    assert {type(errors.from_fault(Fault(reason, ""))) for reason in INPUT} == {errors.InvalidInput}


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.InvalidInput, ValueError),
        (errors.StepTimeout, TimeoutError),
        (errors.ConnectionLost, ConnectionError),
        (errors.SessionExpired, LookupError),
        (errors.SessionExpired, errors.SessionNotFound),
        (errors.SessionsExhausted, errors.Overloaded),
        (errors.StoreUnavailable, errors.ConveyorError),
        (errors.RecordInvalid, errors.ConveyorError),
        (errors.NotDurable, errors.ConveyorError),
    ],
)
def test_classes_are_what_python_calls_them(kind, builtin):
    assert issubclass(kind, builtin)


def test_a_reason_of_a_later_version_keeps_its_name():
    status = to_status(Fault(e.ERROR_REASON_OVERLOADED, "later"))
    info = error_details_pb2.ErrorInfo(reason="NOT_YET_KNOWN", domain="conveyor")
    status.details[0].Pack(info)
    error = errors.from_rpc_status(status)
    assert (type(error), error.reason) == (errors.ConveyorError, "NOT_YET_KNOWN")
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ConnectionLost),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.CallTimeout),
        (grpc.StatusCode.UNIMPLEMENTED, errors.ProtocolError),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDenied),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
        (grpc.StatusCode.DATA_LOSS, errors.ConveyorError),
    ],
)
def test_a_bare_status_goes_by_its_code(code, kind):
    for metadata in (None, (("other", "x"),), (("grpc-status-details-bin", b"\xff\xff"),)):
        error = errors.from_rpc_error(code, "what happened", metadata, "GetModel on host:1")
        assert (type(error), error.code, error.reason) == (kind, code, "")
        assert str(error) == "GetModel on host:1: what happened"


def test_a_unary_status_carries_its_reason_in_the_trailing_metadata():
    status = to_status(Fault(e.ERROR_REASON_MODEL_NOT_FOUND, "no such model", {"model": "m"}))
    metadata = (("grpc-status-details-bin", status.SerializeToString()),)
    error = errors.from_rpc_error(grpc.StatusCode.NOT_FOUND, "no such model", metadata, "GetModel")
    assert type(error) is errors.ModelNotFound
    assert error.metadata == {"model": "m"}


def test_backoff_doubles_within_bounds_and_gives_up_in_time():
    policy = RetryPolicy(first_s=0.1, longest_s=1.0, connect_s=3.0, total_s=10.0)
    backoff = Backoff(policy)
    assert [backoff.failed(0.0, 1.0) for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert backoff.failed(2.5, 1.0) is None
    backoff.progressed()
    assert backoff.failed(100.0, 0.0) == 0.05
    assert backoff.failed(109.0, 1.0, at_least_s=0.9) == 0.9
    assert backoff.failed(109.0, 1.0, at_least_s=1.1) is None
    backoff.restart()
    assert backoff.failed(200.0, 1.0) == 0.1


def test_what_is_worth_another_try():
    assert is_cut(grpc.StatusCode.OK, "")
    assert is_cut(grpc.StatusCode.INTERNAL, "")
    assert is_cut(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert is_cut(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
    assert not is_cut(grpc.StatusCode.DATA_LOSS, "RECORD_INVALID")
    assert not is_cut(grpc.StatusCode.RESOURCE_EXHAUSTED, "")
    assert not is_cut(grpc.StatusCode.UNAUTHENTICATED, "")
    assert not is_cut(grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
