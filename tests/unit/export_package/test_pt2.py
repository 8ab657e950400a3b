"""A .pt2 file becomes a module with torch's own recurrent calls and free sizes, or the reason why not."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conveyor_export.errors import CaptureError, ExportError
from conveyor_export.pt2 import load_pt2
from torch import nn
from torch.export import Dim
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

MAKERS: dict[str, Callable[..., nn.RNNBase]] = {
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}


class Encoder(nn.Module):
    def __init__(self, kind: str, batch_first: bool) -> None:
        super().__init__()
        self.rnn = MAKERS[kind](4, 6, 2, batch_first=batch_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


class Net(nn.Module):
    def __init__(self, kind: str = "lstm", batch_first: bool = True) -> None:
        super().__init__()
        self.encoder = Encoder(kind, batch_first)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = self.head(self.encoder(x))
        return {"y": y if scale is None else y * scale}


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 6), nn.GRUCell(6, 6), nn.RNNCell(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(self.gru(self.lstm(x)[0]))


class Frozen(nn.Module):
    """Writes a size of the time axis into the program."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 6, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.rnn(x)[0]
        return y.reshape(-1, y.shape[1] * 6).reshape(-1, y.shape[1], 2, 3)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)


class Watch(TorchFunctionMode):
    """Which torch functions are called, and in which submodule: all that capture can see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []
        self.names: dict[int, str] = {}
        self.current = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch.lstm_cell, torch.gru_cell}:
            self.seen.append((func.__name__, self.current))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch() -> Iterator[Callable[[nn.Module], Watch]]:
    watched = Watch()

    def enter(module: nn.Module, _: Any) -> None:
        watched.current = watched.names.get(id(module), watched.current)

    def of(module: nn.Module) -> Watch:
        watched.names = {id(part): name for name, part in module.named_modules()}
        return watched

    handle = register_module_forward_pre_hook(enter)
    yield of
    handle.remove()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def make(module: nn.Module, args: tuple[Any, ...], decompose: bool = False, **options: Any) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns about torch's own recurrent modules
            program = torch.export.export(module.eval(), args, **options)
            if decompose:
                program = program.run_decompositions()
            torch.export.save(program, tmp_path / "model.pt2")
        return tmp_path / "model.pt2"

    return make


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_recurrent_calls_come_back_with_free_sizes(
    kind: str, dynamic: bool, batch_first: bool, save: Callable[..., Path], watch: Callable[[nn.Module], Watch]
) -> None:
    module = Net(kind, batch_first)
    shape = (2, 5, 4) if batch_first else (5, 2, 4)
    shapes = {"x": {0 if batch_first else 1: Dim.AUTO}} if dynamic else None
    loaded, example = load_pt2(save(module, (torch.randn(shape),), dynamic_shapes=shapes))
    assert [tuple(tensor.shape) for tensor in example] == [shape]
    assert list(inspect.signature(loaded.forward).parameters) == ["x"]
    for batch, time in ((2, 5), (3, 9), (1, 1)):
        x = torch.randn((batch, time, 4) if batch_first else (time, batch, 4))
        with watch(loaded) as watched, torch.no_grad():
            torch.testing.assert_close(loaded(x), module(x))
            torch.testing.assert_close(loaded(x=x), module(x))
    assert set(watched.seen[:1]) == {(kind, "encoder.rnn")}


def test_module_keeps_its_class_and_parameter_names(save: Callable[..., Path]) -> None:
    module = Net()
    loaded, _ = load_pt2(save(module, (torch.randn(2, 5, 4),)))
    assert type(loaded).__qualname__ == "Net"
    assert type(loaded).__module__ == __name__
    assert set(loaded.state_dict()) == set(module.state_dict())


def test_keyword_inputs_stay_keywords(save: Callable[..., Path]) -> None:
    module, x, scale = Net(), torch.randn(2, 5, 4), torch.tensor(2.0)
    loaded, example = load_pt2(save(module, (x,), kwargs={"scale": scale}))
    assert sorted(example) == ["scale", "x"]
    torch.testing.assert_close(loaded(**example), module(x, scale))


def test_cells_come_back(save: Callable[..., Path], watch: Callable[[nn.Module], Watch]) -> None:
    module, x = Cells(), torch.randn(2, 4)
    loaded, _ = load_pt2(save(module, (x,)))
    with watch(loaded) as watched:
        loaded(x)
    other = torch.randn(5, 4)
    torch.testing.assert_close(loaded(other), module(other))
    assert [name for name, _ in watched.seen] == ["lstm_cell", "gru_cell"]


def test_decomposed_program_is_refused_with_what_to_do(save: Callable[..., Path]) -> None:
    file = save(Net("gru"), (torch.randn(2, 5, 4),), decompose=True)
    with pytest.raises(
        CaptureError, match=r"recurrent calls of encoder\.rnn \(GRU\) are no longer in this file"
    ) as error:
        load_pt2(file)
    assert "Save the program as torch.export.export returns it" in str(error.value)


def test_frozen_time_axis_says_what_to_change(save: Callable[..., Path]) -> None:
    loaded, example = load_pt2(save(Frozen(), (torch.randn(2, 5, 4),)))
    loaded(*example)
    with pytest.raises(
        RuntimeError, match=r"holds sizes of the example that it was exported with, \[\[2, 5, 4\]\]"
    ) as error:
        loaded(torch.randn(2, 7, 4))
    assert "dynamic_shapes" in str(error.value)


class Starts(nn.Module):
    """Starts from a state that is not zeros, made in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.rnn = nn.LSTM(4, 6, batch_first=True)
        self.first = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        state = {
            "learned": lambda: self.first.expand(1, batch, 6).contiguous(),
            "repeated": lambda: self.first.repeat(1, batch, 1),
            "new": lambda: x.new_full((1, batch, 6), 0.5),
            "computed": lambda: x.mean(dim=1)[None, :, :1].expand(1, batch, 6).contiguous(),
            "rows": lambda: torch.arange(batch)[None, :, None].expand(1, batch, 6).float(),
        }[self.how]()
        return self.rnn(x, (state, state * 2))[0]


@pytest.mark.parametrize("how", ["learned", "repeated", "new", "computed"])
def test_initial_state_follows_a_batch_that_was_frozen(how: str, save: Callable[..., Path]) -> None:
    module = Starts(how).eval()
    loaded, _ = load_pt2(save(module, (torch.randn(2, 5, 4),)))
    for batch in (1, 2, 6):
        x = torch.randn(batch, 3, 4)
        if how == "computed" and batch != 2:
            # Frozen by an operation that is not the start of a recurrent call.
            with pytest.raises(RuntimeError, match="holds sizes of the example"):
                loaded(x)
        else:
            torch.testing.assert_close(loaded(x), module(x))


def test_initial_state_too_small_never_reaches_torch(save: Callable[..., Path]) -> None:
    """torch's own functions would read beyond its end."""
    loaded, _ = load_pt2(save(Starts("rows"), (torch.randn(2, 5, 4),)))
    with pytest.raises(RuntimeError, match="an initial state has 2 rows and the input 64"):
        loaded(torch.randn(64, 5, 4))


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, answers = x.new_zeros(x.shape[0], 6), []
        for step in x.unbind(1):
            state = self.cell(step, state)
            answers.append(state)
        return torch.stack(answers, 1)


def test_unrolled_loop_is_refused(save: Callable[..., Path]) -> None:
    file = save(Loop(), (torch.randn(2, 5, 4),))
    with pytest.raises(CaptureError, match=r"module 'cell': its loop over time is unrolled in this file into 5 calls"):
        load_pt2(file)


def test_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read as a"):
        load_pt2(tmp_path / "nothing.pt2")
    (tmp_path / "text.pt2").write_text("not a zip")
    with pytest.raises(ExportError, match="cannot be read as a"):
        load_pt2(tmp_path / "text.pt2")
