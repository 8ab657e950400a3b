"""Step models made by hand with onnx.helper, and batches for them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conveyor_proto import spec as specs
from conveyor_proto.codec import Array, to_data_type
from conveyor_proto.v1 import spec_pb2
from conveyor_server.runner.base import Run
from conveyor_server.runner.onnx_runner import OnnxRunner
from conveyor_server.runner.provider import Host
from conveyor_server.runner.step_file import read_step_file
from onnx import helper, numpy_helper

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass
class ModelMaker:
    """Builds a step model: nodes, weights and the ModelSpec side by side."""

    seed: int = 0
    spec: spec_pb2.ModelSpec = field(default_factory=lambda: spec_pb2.ModelSpec(spec_version=1, name="hand-made"))
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def node(self, op_type: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=f"n{len(self.nodes)}", **attributes))
        return outputs[0]

    def weight(self, value: Array, name: str = "") -> str:
        name = name or f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def random(self, *shape: int) -> Array:
        scale = 1 / np.sqrt(shape[-1])
        return self.rng.uniform(-scale, scale, shape).astype(np.float32)

    def input(self, name: str, shape: Sequence[int], *, dtype: type = np.float32, has_time: bool = True) -> str:
        self.spec.inputs.add(name=name, dtype=to_data_type(np.dtype(dtype)), shape=shape, has_time=has_time)
        axes = ["batch", "time"] if has_time else ["batch"]
        self.inputs.append(_info(name, dtype, [*axes, *shape]))
        return name

    def output(self, name: str, shape: Sequence[int], *, dtype: type = np.float32, has_time: bool = True) -> str:
        self.spec.outputs.add(name=name, dtype=to_data_type(np.dtype(dtype)), shape=shape, has_time=has_time)
        axes = ["batch", "time"] if has_time else ["batch"]
        self.outputs.append(_info(name, dtype, [*axes, *shape]))
        return name

    def state(self, name: str, shape: Sequence[int], *, dtype: type = np.float32, initial: Array | None = None) -> str:
        """Declares a state; its graph input is `NAME_in` and its graph output `NAME_out`."""
        data = b"" if initial is None else initial.tobytes()
        self.spec.states.add(
            name=name,
            input_name=f"{name}_in",
            output_name=f"{name}_out",
            dtype=to_data_type(np.dtype(dtype)),
            shape=shape,
            initial=data,
        )
        self.inputs.append(_info(f"{name}_in", dtype, ["batch", *shape]))
        self.outputs.append(_info(f"{name}_out", dtype, ["batch", *shape]))
        return f"{name}_in"

    def lengths(self) -> str:
        if not self.spec.lengths_input:
            self.spec.lengths_input = "lengths"
            self.inputs.append(_info("lengths", np.int32, ["batch"]))
        return "lengths"

    def recurrent(
        self,
        kind: str,
        x: str,
        size: int,
        hidden: int,
        *,
        prefix: str = "l0",
        activation: str = "",
        initial: bool = False,
    ) -> str:
        """One layer over `x` `[batch, time, size]`; returns the value `[batch, time, hidden]`."""
        gates = _GATES[kind] * hidden
        states = [f"{prefix}.hidden"] + ([f"{prefix}.cell"] if kind == "LSTM" else [])
        lengths, axis0, axis1 = self.lengths(), self.weight(np.array([0])), self.weight(np.array([1]))
        operands = [self.node("Transpose", [x], f"{prefix}.x", perm=[1, 0, 2])]
        operands += [self.weight(self.random(1, gates, size)), self.weight(self.random(1, gates, hidden))]
        operands += [self.weight(self.random(1, 2 * gates)), lengths]
        for name in states:
            row = self.rng.uniform(-1, 1, hidden).astype(np.float32) if initial else None
            operands.append(self.node("Unsqueeze", [self.state(name, [hidden], initial=row), axis0], f"{name}.u"))
        attributes: dict[str, Any] = {"linear_before_reset": 1} if kind == "GRU" else {}
        if activation:
            attributes["activations"] = [activation]
        new = [f"{name}.new" for name in states]
        self.node(kind, operands, f"{prefix}.y", *new, hidden_size=hidden, **attributes)
        for name in states:
            self.node("Squeeze", [f"{name}.new", axis0], f"{name}_out")
        squeezed = self.node("Squeeze", [f"{prefix}.y", axis1], f"{prefix}.ys")
        return self.node("Transpose", [squeezed], f"{prefix}.out", perm=[1, 0, 2])

    def head(self, y: str, hidden: int, size: int, *, form: str = "MatMul", name: str = "y") -> str:
        """A linear layer over `[batch, time, hidden]` as the user output `name`."""
        matrix, bias = self.random(hidden, size), self.weight(self.random(size))
        self.output(name, [size])
        if form == "MatMul":
            product = self.node("MatMul", [y, self.weight(matrix)], f"{name}.product")
            return self.node("Add", [product, bias], name)
        rows = self.node("Reshape", [y, self.weight(np.array([-1, hidden]))], f"{name}.rows")
        transposed = self.weight(np.ascontiguousarray(matrix.T))
        product = self.node("Gemm", [rows, transposed, bias], f"{name}.product", transB=1)
        axes = self.node("Shape", [y], f"{name}.axes", start=0, end=2)
        shape = self.node("Concat", [axes, self.weight(np.array([size]))], f"{name}.shape", axis=0)
        return self.node("Reshape", [product, shape], name)

    def proto(self) -> onnx.ModelProto:
        self.spec.state_bytes = sum(map(specs.state_row_bytes, self.spec.states))
        graph = helper.make_graph(self.nodes, "step", self.inputs, self.outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        helper.set_model_props(model, {specs.METADATA_KEY: specs.dump_spec(self.spec)})
        return model


def _info(name: str, dtype: type, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


KINDS = {
    "lstm": ("LSTM", ""),
    "gru": ("GRU", ""),
    "rnn-tanh": ("RNN", "Tanh"),
    "rnn-relu": ("RNN", "Relu"),
}


@dataclass(frozen=True)
class Reference:
    """A step model in bare onnxruntime, its state in numpy: what a runner is compared with."""

    proto: onnx.ModelProto
    spec: spec_pb2.ModelSpec

    def __post_init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(self.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        object.__setattr__(self, "session", session)

    def fresh(self, rows: int) -> list[Array]:
        """The initial state of `rows` sessions."""
        return [np.repeat(specs.initial_row(state)[np.newaxis], rows, axis=0) for state in self.spec.states]

    def step(self, states: Sequence[Array], inputs: Sequence[Array], lengths: Array) -> tuple[list[Array], list[Array]]:
        """Outputs and new states."""
        feeds = {item.name: array for item, array in zip(self.spec.inputs, inputs, strict=True)}
        feeds |= {state.input_name: array for state, array in zip(self.spec.states, states, strict=True)}
        feeds |= {self.spec.lengths_input: lengths} if self.spec.lengths_input else {}
        names = [item.name for item in self.spec.outputs] + [state.output_name for state in self.spec.states]
        values: list[Array] = self.session.run(names, feeds)  # type: ignore[attr-defined]
        return values[: len(self.spec.outputs)], values[len(self.spec.outputs) :]


@pytest.fixture
def maker() -> type[ModelMaker]:
    return ModelMaker


@pytest.fixture
def reference() -> type[Reference]:
    return Reference


@pytest.fixture
def recurrent() -> Callable[..., onnx.ModelProto]:
    """Makes a recurrent model of a kind with a linear head."""

    def make(
        kind: str,
        *,
        layers: int = 1,
        size: int = 5,
        hidden: int = 16,
        head: str = "MatMul",
        outputs: int = 3,
        initial: bool = False,
        seed: int = 0,
    ) -> onnx.ModelProto:
        op_type, activation = KINDS[kind]
        model = ModelMaker(seed)
        value, width = model.input("x", [size]), size
        for layer in range(layers):
            prefix = f"l{layer}"
            value = model.recurrent(
                op_type, value, width, hidden, prefix=prefix, activation=activation, initial=initial
            )
            width = hidden
        model.head(value, hidden, outputs, form=head)
        return model.proto()

    return make


@pytest.fixture
def save(tmp_path: Path) -> Callable[[onnx.ModelProto], Path]:
    """Writes a model to a file `model.onnx`."""

    def write(proto: onnx.ModelProto) -> Path:
        path = tmp_path / "model.onnx"
        onnx.save(proto, path)
        return path

    return write


@pytest.fixture
def load(save: Callable[[onnx.ModelProto], Path]) -> Iterator[Callable[..., OnnxRunner]]:
    """Opens runners on the CPU, and closes them. `shares_memory=False` runs the code of a GPU on the CPU."""
    opened: list[OnnxRunner] = []

    def make(proto: onnx.ModelProto, *, capacity: int = 64, threads: int = 1, shares_memory: bool = True) -> OnnxRunner:
        runner = OnnxRunner(read_step_file(save(proto)), Host("cpu", threads, shares_memory), capacity)
        opened.append(runner)
        return runner

    yield make
    for runner in opened:
        runner.close()


@pytest.fixture
def one_run() -> Callable[..., Run]:
    """Makes a Run; what is not given is a fresh row of one time step each."""

    def make(
        inputs: Sequence[Array],
        destinations: Sequence[int],
        *,
        sources: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Run:
        rows = len(destinations)
        return Run(
            sources=np.array(sources if sources is not None else [0] * rows, np.int64),
            destinations=np.array(destinations, np.int64),
            fresh=np.full(rows, sources is None),
            lengths=np.array(lengths if lengths is not None else [inputs[0].shape[1]] * rows, np.int32),
            inputs=inputs,
        )

    return make
