"""What cannot be streamed is refused: the message names the submodule and the reason, and says what to do."""

import pytest
import torch
import torch.nn.functional as F
from conveyor_export.capture import CaptureError, capture
from torch import nn


class Parts(nn.Module):
    """A GRU and whatever the cases need beside it; `way` is the case's forward."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.gru, self.decoder = nn.GRU(4, 4, batch_first=True), nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.stats = nn.BatchNorm1d(4, track_running_stats=False)
        self.instance = nn.InstanceNorm1d(4)
        self.centred, self.bare, self.strided = (
            nn.Conv1d(4, 4, 3, padding=1),
            nn.Conv1d(4, 4, 3),
            nn.Conv1d(4, 4, 2, stride=2),
        )
        self.cell = nn.LSTMCell(4, 4)
        self.table = nn.Parameter(torch.randn(1, 50, 4))

    def forward(self, x):
        return self.way(self, x)


def run(m, x):
    return m.gru(x)[0]


def over_time(module, y):
    return module(y.transpose(1, 2)).transpose(1, 2)


def attend(m, x):
    y = run(m, x)
    return torch.softmax(y @ y.transpose(1, 2), -1) @ y


def pool_by_attention(m, x):
    y = run(m, x)
    return (torch.softmax(m.head(y)[..., :1], 1) * y).sum(1)


def sequence_to_sequence(m, x):
    _, h = m.gru(x)
    return m.decoder(x, (h, torch.zeros_like(h)))[0]


def branch_on_values(m, x):
    y = run(m, x)
    return y * 2 if y.sum() > 0 else y


def branch_on_steps(m, x):
    return run(m, x) * (2 if x.shape[1] % 2 else 1)


def feed_back(m, x):
    state = (x.new_zeros(x.shape[0], 4), x.new_zeros(x.shape[0], 4))
    answer, answers = x.new_zeros(x.shape[0], 4), []
    for step in range(x.shape[1]):
        state = m.cell(x[:, step] + answer, state)
        answer = torch.sin(3 * state[0])
        answers.append(answer)
    return torch.stack(answers, 1)


def mean_of_a_loop(m, x):
    state, answers = None, []
    for step in range(x.shape[1]):
        state = m.cell(x[:, step], state)
        answers.append(state[0])
    return torch.stack(answers, 1).mean(1)


def convolve_and_loop(m, x):
    state, answers = None, []
    for step in over_time(m.bare, F.pad(x, (0, 0, 2, 0))).unbind(1):
        state = m.cell(step, state)
        answers.append(state[0])
    return torch.stack(answers, 1)


def random_start(m, x):
    return m.gru(x, torch.randn(1, x.shape[0], 4))[0]


CASES = {
    "attention by a module": (lambda m, x: m.attention(run(m, x), x, x)[0], "attention", "attention over time"),
    "attention by hand": (attend, "", "attention over time"),
    "a transformer layer": (lambda m, x: m.encoder(run(m, x)), "encoder.self_attn", "attention over time"),
    "softmax": (pool_by_attention, "", "softmax over time"),
    "mean": (lambda m, x: m.head(run(m, x).mean(1)), "", "mean over time"),
    "mean subtracted": (lambda m, x: run(m, x - x.mean(1, keepdim=True)), "", "mean over time"),
    "sum": (lambda m, x: run(m, x).sum(dim=1), "", "sum over time"),
    "max": (lambda m, x: run(m, x).max(1).values, "", "maximum over time"),
    "flip": (lambda m, x: run(m, x.flip(1)), "", r"reversal \(flip\) over time"),
    "cumsum": (lambda m, x: run(m, x.cumsum(1)), "", r"cumulative sum \(cumsum\) over time"),
    "sort": (lambda m, x: run(m, x.sort(1).values), "", "sort over time"),
    "pooling": (lambda m, x: F.adaptive_max_pool1d(run(m, x).transpose(1, 2), 1), "", "pools over time"),
    "statistics of a batch": (
        lambda m, x: over_time(m.stats, run(m, x)),
        "stats",
        "statistics of the batch and of time",
    ),
    "statistics of an instance": (lambda m, x: over_time(m.instance, run(m, x)), "instance", "statistics over time"),
    "centred convolution": (lambda m, x: run(m, over_time(m.centred, x)), "centred", "looks 1 time steps ahead"),
    "unpadded convolution": (lambda m, x: run(m, over_time(m.bare, x)), "bare", "looks 2 time steps ahead"),
    "right-padded convolution": (
        lambda m, x: run(m, over_time(m.bare, F.pad(x, (0, 0, 0, 2)))),
        "bare",
        "looks 2 time steps ahead",
    ),
    "strided convolution": (lambda m, x: run(m, over_time(m.strided, x)), "strided", "over time with stride 2"),
    "windows": (lambda m, x: run(m, x).unfold(1, 2, 1), "", "another number of time steps"),
    "encoder and decoder": (sequence_to_sequence, "decoder", "an encoder needs the whole input"),
    "the first step": (lambda m, x: run(m, x)[:, 0], "", "reads time step 0"),
    "the first steps": (lambda m, x: run(m, x)[:, :4], "", "fixed number of time steps"),
    "the last steps": (lambda m, x: run(m, x)[:, -3:], "", "reads the last steps"),
    "the last step everywhere": (lambda m, x: x + run(m, x)[:, -1:], "", "last time step at every step"),
    "later steps": (lambda m, x: run(m, x[:, 1:]), "", "drops the first 1 time steps"),
    "positions": (lambda m, x: run(m, x + m.table[:, : x.shape[1]]), "", "absolute time step"),
    "the number of steps": (lambda m, x: run(m, x) / x.shape[1], "", "computes with the number of time steps"),
    "values decide": (branch_on_values, "", "control flow depends on the values of tensors"),
    "the number of steps decides": (branch_on_steps, "", "something else for other numbers of rows or time steps"),
    "one row would lose its batch": (lambda m, x: run(m, x)[..., :1].squeeze(), "", "squeezes all axes"),
    "random numbers": (lambda m, x: run(m, x + torch.randn_like(x)), "", "draws random numbers"),
    "a random start": (random_start, "gru", "it is random"),
    "answers fed back": (feed_back, "", "do not add up to the whole sequence"),
    "a causal convolution before a loop": (convolve_and_loop, "bare", "convolves over time in a module that loops"),
    "the mean of a loop": (mean_of_a_loop, "", "mean over time"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_the_submodule_and_the_reason(case, capfd):
    way, path, reason = CASES[case]
    with pytest.raises(CaptureError, match=reason) as refusal:
        capture(Parts(way), torch.randn(2, 9, 4))
    assert refusal.value.path == path
    assert (f"module {path!r}: " if path else "the module (Parts): ") in str(refusal.value)
    assert refusal.value.advice
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_bidirectional_layers(kind):
    module = nn.ModuleDict({"layer": kind(4, 3, bidirectional=True)})
    module.forward = lambda x: module["layer"](x)[0]
    with pytest.raises(CaptureError, match=r"module 'layer': it is bidirectional.*unidirectional"):
        capture(module, torch.randn(5, 2, 4))


def test_no_recurrent_state():
    with pytest.raises(CaptureError, match="it has no recurrent state"):
        capture(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), torch.randn(2, 5, 4))


def test_a_single_step_that_forgets():
    with pytest.raises(CaptureError, match=r"nothing is remembered between calls.*forward's signature"):
        capture(nn.GRUCell(4, 5), torch.randn(2, 4))


def test_state_kept_in_an_attribute():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.state = nn.GRU(4, 5, batch_first=True), None

        def forward(self, x):
            y, self.state = self.gru(x, self.state)
            return y

    module = Keeps()
    with pytest.raises(CaptureError, match=r"module 'gru': .*keeps it in an attribute"):
        capture(module, torch.randn(2, 5, 4))
    assert module.state is None


def test_a_start_computed_from_an_input_without_time():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.start = nn.GRU(4, 5, batch_first=True), nn.Linear(2, 5)

        def forward(self, x, image):
            return self.gru(x, self.start(image)[None])[0]

    with pytest.raises(CaptureError, match=r"module 'gru': its initial state is computed from the input \(image\)"):
        capture(Conditioned(), (torch.randn(2, 5, 4), torch.randn(2, 2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_precisions(dtype):
    module = nn.ModuleDict({"layer": nn.GRU(4, 5, batch_first=True)}).to(dtype)
    module.forward = lambda x: module["layer"](x)[0]
    with pytest.raises(CaptureError, match=r"module 'layer': its weights are float\d\d.*module\.float\(\)"):
        capture(module, torch.randn(2, 5, 4, dtype=dtype))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_modules():
    with pytest.raises(CaptureError, match=r"compiled by TorchScript.*Give the nn\.Module"):
        capture(torch.jit.script(nn.GRU(4, 5, batch_first=True)), torch.randn(2, 5, 4))


def test_recurrence_along_another_axis():
    class Across(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(1, 5, batch_first=True)

        def forward(self, x):
            batch, time, features = x.shape
            return self.gru(x.reshape(batch * time, features, 1))[0].reshape(batch, time, features * 5)

    with pytest.raises(CaptureError, match=r"module 'gru': .*another axis than time"):
        capture(Across(), torch.randn(2, 6, 4))


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ((torch.randn(2, 5, 3),), "forward raised RuntimeError on the example inputs"),
        ((), "do not fit forward"),
        ((torch.randn(5, 4),), "no batch and time axis"),
        ({"y": torch.randn(2, 5, 4)}, "forward raised|do not fit forward"),
        ((3,), "hold no tensor"),
    ],
)
def test_examples_that_do_not_fit(example, reason):
    with pytest.raises(CaptureError, match=reason):
        capture(nn.GRU(4, 5, batch_first=True), example)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({"input_names": ["a", "b"]}, "2 input_names for 1 inputs"),
        ({"output_names": []}, "0 output_names for 1 outputs"),
    ],
)
def test_names_that_do_not_fit(names, reason):
    with pytest.raises(CaptureError, match=reason):
        capture(nn.GRU(4, 5, batch_first=True), torch.randn(2, 5, 4), **names)
