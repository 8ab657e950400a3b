"""Outputs as the protocol's response. Every output travels in raw_output_contents: C++ clients index it unchecked."""

from collections.abc import Sequence

from conveyor_proto.codec import Array
from conveyor_proto.inference import service_pb2 as pb
from conveyor_proto.v1 import spec_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.inference.datatypes import datatype
from conveyor_server.inference.job import Job
from conveyor_server.inference.requests import Content


def respond(job: Job, engine: Engine, content: Content, outputs: Sequence[Array]) -> pb.ModelInferResponse:
    """The response to a request.

    Args:
        job: the request, with the parameters of its response.
        engine: of the model version that answers.
        content: what was read of the request.
        outputs: one for each of ModelSpec.outputs: `[batch, time, *shape]`, or `[batch, *shape]` without time.
    """
    request, spec = job.request, engine.spec
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=engine.version, id=request.id)
    for key, note in job.notes.items():
        parameter = response.parameters[key]
        if isinstance(note, bool):
            parameter.bool_param = note
        elif isinstance(note, int):
            parameter.int64_param = note
        else:
            parameter.string_param = note
    for index in content.outputs:
        item = spec.outputs[index]
        shape = _shape(item, content)
        response.outputs.add(name=item.name, datatype=datatype(item), shape=shape)
        response.raw_output_contents.append(outputs[index].tobytes())
    return response


def _shape(item: spec_pb2.TensorSpec, content: Content) -> list[int]:
    """The axes of an answer are those of the request; of an output without time, at least its batch."""
    count, row = content.batch, list(item.shape)
    if not item.has_time:
        return [count, *row] if content.batched or content.timed else row
    return [*([count] if content.batched else []), *([content.length] if content.timed else []), *row]
