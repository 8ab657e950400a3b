"""Good inputs of each decoder, so that what is made of them gets past the first check."""

import numpy as np
import onnx
from conveyor_proto import codec, vectors
from conveyor_proto import spec as specs
from conveyor_proto.inference import service_pb2
from conveyor_proto.v1 import session_pb2, spec_pb2, tensor_pb2, vectors_pb2
from conveyor_server import snapshot
from conveyor_server.keeper import body
from google.protobuf.timestamp_pb2 import Timestamp

YAML = b"""conveyor: 1
batch: dynamic
inputs:
  x: {batch_axis: 0, time_axis: 1}
outputs:
  y: {batch_axis: 0, time_axis: 1}
states:
  - {input: h, output: h2, batch_axis: 0, shape: [4], initial: 0}
constants: {sr: 16000}
"""
ACCESS = b"""[[tokens]]
name = "x"
sha256 = "%s"
tenant = "t"
roles = ["infer", "admin"]
[anonymous]
tenant = "*"
roles = ["observe"]
[tenants.t]
models = ["a*"]
max_sessions = 3
""" % (b"a" * 64)


def tensors(length: int) -> list[tensor_pb2.Tensor]:
    return [
        codec.encode(np.ones((length, 3), np.float32), "x"),
        codec.encode(np.array(2.0), "gain"),
    ]


def steps() -> list[bytes]:
    bare = tensor_pb2.Tensor(data=bytes(24))
    made = [session_pb2.Step(handle=1, seq=seq, inputs=tensors(seq), acked_seq=1) for seq in (1, 3)]
    made.append(session_pb2.Step(handle=1, seq=2, inputs=[bare, tensor_pb2.Tensor(data=bytes(8))]))
    return [item.SerializeToString() for item in made]


def frames() -> list[bytes]:
    made = []
    for lengths in ([1, 1], [2, 5], [3]):
        rows = len(lengths)
        made.append(
            session_pb2.StepFrame(
                handles=np.arange(rows, dtype=np.uint32).tobytes(),
                seqs=np.ones(rows, np.uint64).tobytes(),
                lengths=b"" if set(lengths) == {1} else np.array(lengths, np.uint32).tobytes(),
                columns=[bytes(12 * sum(lengths)), bytes(8 * rows)],
            ).SerializeToString()
        )
    return made


def inferences() -> list[bytes]:
    request = service_pb2.ModelInferRequest(model_name="m", id="1")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2, 3]).contents.fp32_contents.extend([1.0] * 6)
    request.inputs.add(name="gain", datatype="FP64", shape=[1]).contents.fp64_contents.append(1.0)
    request.parameters["sequence_id"].int64_param = 7
    raw = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[bytes(24), bytes(8)])
    raw.inputs.add(name="x", datatype="FP32", shape=[2, 3])
    raw.inputs.add(name="gain", datatype="FP64", shape=[])
    raw.outputs.add(name="y")
    return [request.SerializeToString(), raw.SerializeToString()]


def snapshots() -> list[bytes]:
    content = session_pb2.Snapshot(
        format=snapshot.FORMAT,
        model="m",
        version="1",
        model_digest="d",
        applied_seq=3,
        states=[codec.encode(np.ones(4, np.float32), "h"), codec.encode(np.ones(1), "c")],
        taken_at=Timestamp(seconds=1),
    ).SerializeToString()
    return [content, snapshot.PLAIN.close(content)]


def onnx_files() -> list[bytes]:
    helper = onnx.helper
    value = helper.make_tensor_value_info
    shapes = {"x": ["b", "t", 4], "h": ["b", 4], "y": ["b", "t", 4], "h2": ["b", 4]}
    infos = {name: value(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    inputs, outputs = [infos["x"], infos["h"]], [infos["y"], infos["h2"]]
    nodes = [helper.make_node("Identity", [source], [result]) for source, result in (("x", "y"), ("h", "h2"))]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    described = onnx.ModelProto()
    described.CopyFrom(plain)
    spec = spec_pb2.ModelSpec(spec_version=1, name="m", state_bytes=16, max_time_steps_per_run=1)
    spec.inputs.add(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[4], has_time=True)
    spec.outputs.add(name="y", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[4], has_time=True)
    spec.states.add(name="h", input_name="h", output_name="h2", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[4])
    helper.set_model_props(described, {specs.METADATA_KEY: specs.dump_spec(spec)})
    outside = onnx.ModelProto()
    outside.CopyFrom(plain)
    weights = outside.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="../../etc/passwd")
    return [item.SerializeToString() for item in (plain, described, outside)]


def verifier_vectors() -> list[bytes]:
    made = vectors_pb2.VerifierVectors(vectors_version=1)
    for time_steps, every in ((1, 1), (5, 3)):
        made.vectors.add(
            time_steps=time_steps,
            inputs=[bytes(12 * time_steps), bytes(8)],
            outputs=[vectors.expected(np.ones((time_steps, 2), np.float32), every, 1e-5)],
            states=[vectors.expected(np.ones(4, np.float32), every, 0.0), vectors.expected(np.ones(1), 1, 1.0)],
        )
    return [vectors.dump_vectors(made).encode()]


def bodies() -> list[bytes]:
    states = [np.ones((1, 4), np.float32), np.ones((1, 1))]
    one = np.array([3])
    answers = [(one, np.array([9], np.uint64), 2, [np.ones((1, 2, 2), np.float32)])]
    fresh = body.Piece([0], np.array([0]), np.array([0]), np.array([1e9]), [], [])
    used = body.Piece([0], one, one, np.array([1e9]), states, answers)
    return [body.encode(piece)[0] for piece in (fresh, used)]
