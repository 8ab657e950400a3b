"""What a request says beside its tensors: which sequence it is of, its first and last, how long it may wait.

Invariant: a parameter that would be ignored to a client's harm is refused; those that only help are ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from conveyor_proto.inference import service_pb2
from conveyor_proto.v1 import errors_pb2 as e

from conveyor_server.errors import refuse

_MOST_ID_BYTES = 128
# They name memory that the server cannot see, and the request would be run on something else.
_NOT_OFFERED = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size", "classification")


@dataclass(frozen=True, slots=True)
class Parameters:
    """What was asked for.

    Attributes:
        sequence: the correlation id; None: the request is of no sequence. 5 and "5" are two sequences.
        start: the sequence begins with it.
        end: the sequence ends with it.
        timeout_s: how long it may wait before it begins; 0: the server's limit.
    """

    sequence: int | str | None = None
    start: bool = False
    end: bool = False
    timeout_s: float = 0.0


def read_parameters(given: Mapping[str, service_pb2.InferParameter], model: str) -> Parameters:
    """The parameters of a request.

    Raises:
        Refused: MESSAGE_INVALID, a parameter of another kind than it takes; NOT_OFFERED.
    """
    refuse_memory(given, "request")
    sequence: int | str | None = None
    if "sequence_id" in given:
        value = _value(given, "sequence_id", int, str)
        sequence = value if isinstance(value, int | str) and value else None
        if isinstance(sequence, str) and len(sequence.encode()) > _MOST_ID_BYTES:
            raise refuse(
                e.ERROR_REASON_SEQUENCE_INVALID,
                f"string correlation ID for model '{model}' has {len(sequence.encode())} bytes and may have "
                f"{_MOST_ID_BYTES}",
                model=model,
                sequence_id=sequence[:_MOST_ID_BYTES],
            )
    timeout = _value(given, "timeout", int) if "timeout" in given else 0
    return Parameters(
        sequence,
        bool(_value(given, "sequence_start", bool)) if "sequence_start" in given else False,
        bool(_value(given, "sequence_end", bool)) if "sequence_end" in given else False,
        max(0, int(timeout)) / 1e6,
    )


def refuse_memory(given: Mapping[str, service_pb2.InferParameter], where: str) -> None:
    """Refuses what would put a tensor elsewhere than in the message, or make something else of it.

    Raises:
        Refused: NOT_OFFERED.
    """
    for name in _NOT_OFFERED:
        if name in given:
            raise not_offered(name, f"the {where}'s parameter '{name}' is not supported: send and receive tensors raw")


def not_offered(feature: str, message: str) -> Exception:
    """The refusal (NOT_OFFERED) of a part of the protocol, to be raised by the caller."""
    return refuse(e.ERROR_REASON_NOT_OFFERED, message, feature=feature)


def _value(given: Mapping[str, service_pb2.InferParameter], name: str, *kinds: type) -> int | str | float | bool:
    parameter = given[name]
    choice = parameter.WhichOneof("parameter_choice")
    value: int | str | float | bool | None = getattr(parameter, choice) if choice else None
    # A bool is an int in Python, and not here.
    if value is None or type(value) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise refuse(
            e.ERROR_REASON_MESSAGE_INVALID,
            f"parameter '{name}' takes {wanted}, and {choice or 'nothing'} came",
            field=f"parameters.{name}",
        )
    return value
