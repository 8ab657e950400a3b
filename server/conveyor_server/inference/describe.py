"""What a model is, in the protocol's words: metadata and configuration, with the settings that are really in force."""

from conveyor_proto.inference import model_config_pb2 as config_pb
from conveyor_proto.inference import service_pb2 as pb
from conveyor_proto.v1 import spec_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.inference.datatypes import config_type, datatype
from conveyor_server.repository import ModelVersion
from conveyor_server.sessions.limits import SessionLimits

PLATFORM = "onnxruntime_onnx"
_BACKEND = "onnxruntime"
_MODEL_FILE = "model.onnx"


def metadata(item: ModelVersion[Engine], versions: list[str]) -> pb.ModelMetadataResponse:
    """A served version's tensors: `-1` is the batch axis, and behind it, where there is one, the time axis.

    Args:
        item: READY.
        versions: of the model, that are READY.
    """
    spec = item.serving.spec
    return pb.ModelMetadataResponse(
        name=item.name,
        versions=versions,
        platform=PLATFORM,
        inputs=[_tensor(tensor) for tensor in spec.inputs],
        outputs=[_tensor(tensor) for tensor in spec.outputs],
    )


def config(item: ModelVersion[Engine], limits: SessionLimits) -> config_pb.ModelConfig:
    """A served version's configuration. A model with state has `sequence_batching`, by which load tools know it.

    Args:
        item: READY.
        limits: of sessions.
    """
    engine = item.serving
    spec, most = engine.spec, engine.limits.max_batch
    kind = config_pb.ModelInstanceGroup.KIND_CPU
    if engine.runner.device != "cpu":
        kind = config_pb.ModelInstanceGroup.KIND_GPU
    message = config_pb.ModelConfig(
        name=item.name,
        platform=PLATFORM,
        backend=_BACKEND,
        version_policy=config_pb.ModelVersionPolicy(all=config_pb.ModelVersionPolicy.All()),
        max_batch_size=most,
        input=[
            config_pb.ModelInput(name=tensor.name, data_type=config_type(tensor), dims=_dims(tensor))
            for tensor in spec.inputs
        ],
        output=[
            config_pb.ModelOutput(name=tensor.name, data_type=config_type(tensor), dims=_dims(tensor))
            for tensor in spec.outputs
        ],
        instance_group=[config_pb.ModelInstanceGroup(name=item.name, kind=kind, count=1)],
        default_model_filename=_MODEL_FILE,
        model_transaction_policy=config_pb.ModelTransactionPolicy(decoupled=False),
    )
    message.parameters["conveyor_digest"].string_value = spec.digest
    if spec.states:
        message.sequence_batching.CopyFrom(_sequences(spec, limits, most))
    else:
        message.dynamic_batching.CopyFrom(config_pb.ModelDynamicBatching())
    return message


def _sequences(spec: spec_pb2.ModelSpec, limits: SessionLimits, most: int) -> config_pb.ModelSequenceBatching:
    """As Triton's strategy `oldest`: any sequences that have a request share a run, and none has a place of its own."""
    return config_pb.ModelSequenceBatching(
        max_sequence_idle_microseconds=round(min(limits.default_idle_timeout_s, limits.max_idle_timeout_s) * 1e6),
        oldest=config_pb.ModelSequenceBatching.StrategyOldest(
            max_candidate_sequences=limits.max_sessions, preferred_batch_size=[most], max_queue_delay_microseconds=0
        ),
        state=[_state(state) for state in spec.states],
    )


def _state(state: spec_pb2.StateSpec) -> config_pb.ModelSequenceBatching.State:
    initial = config_pb.ModelSequenceBatching.InitialState(
        name=state.name, data_type=config_type(state), dims=state.shape, zero_data=True
    )
    return config_pb.ModelSequenceBatching.State(
        input_name=state.input_name,
        output_name=state.output_name,
        data_type=config_type(state),
        dims=state.shape,
        # One that is not zeros lies in the model's file, and has no field here.
        initial_state=[] if any(state.initial) else [initial],
    )


def _tensor(item: spec_pb2.TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=item.name, datatype=datatype(item), shape=[-1, *_dims(item)])


def _dims(item: spec_pb2.TensorSpec) -> list[int]:
    """A row's shape, behind a time axis where the model's file has one: a client knows the file."""
    return [*([-1] if item.has_time and not item.time_added else []), *item.shape]
