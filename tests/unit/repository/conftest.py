"""A model folder on disk with files made by hand, and a repository over it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conveyor_proto import spec as specs
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from conveyor_server.repository import Repository
from conveyor_server.runner.base import Runner
from conveyor_server.runner.onnx_runner import open_runner
from onnx import TensorProto, helper, numpy_helper

Served = tuple[str, str, Runner]


@pytest.fixture
def model_spec() -> spec_pb2.ModelSpec:
    """Of `model_proto`."""
    spec = spec_pb2.ModelSpec(spec_version=1, name="exported-as", lengths_input="lengths", state_bytes=8)
    spec.inputs.add(name="tokens", dtype=tensor_pb2.DATA_TYPE_INT64, has_time=True)
    spec.outputs.add(name="y", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], has_time=True)
    spec.states.add(name="sum", input_name="h", output_name="h2", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2])
    return spec


@pytest.fixture
def model_proto(model_spec: spec_pb2.ModelSpec) -> onnx.ModelProto:
    """A running sum over tokens looked up in a table of 7: one state, one output."""
    info = helper.make_tensor_value_info
    table = np.arange(14, dtype=np.float32).reshape(7, 2)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "tokens"], ["y"]),
            helper.make_node("ReduceSum", ["y", "axis"], ["total"], keepdims=0),
            helper.make_node("Add", ["h", "total"], ["h2"]),
        ],
        "step",
        [
            info("tokens", TensorProto.INT64, ["batch", "time"]),
            info("h", TensorProto.FLOAT, ["batch", 2]),
            info("lengths", TensorProto.INT32, ["batch"]),
        ],
        [info("y", TensorProto.FLOAT, ["batch", "time", 2]), info("h2", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {specs.METADATA_KEY: specs.dump_spec(model_spec)})
    return model


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    root.mkdir()
    return root


@pytest.fixture
def add(models: Path, model_proto: onnx.ModelProto) -> Callable[..., Path]:
    """Puts a model into the folder."""

    def put(name: str, version: str, proto: onnx.ModelProto | bytes = model_proto) -> Path:
        path = models / name / version / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
        return path

    return put


@pytest.fixture
def repository(models: Path) -> Repository[Served]:
    return Repository(
        models,
        open_runner=lambda path: open_runner(path, device="cpu", threads=1, capacity=8),
        make_engine=lambda prepared: (prepared.name, prepared.version, prepared.runner),
    )
