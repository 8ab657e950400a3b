"""Capture leaves no trace: not in the module, not in torch, not on the screen, not in the graph."""

import logging
import warnings

import pytest
import torch
from conveyor_export.capture import CaptureError, capture
from torch import nn
from torch.nn.modules import module as torch_modules


class Model(nn.Module):
    def __init__(self, *, refused=False):
        super().__init__()
        self.gru = nn.GRU(4, 5, 2, batch_first=True, dropout=0.5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.refused = refused
        self.history = []
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.history.append(x.shape)
        self.last_input = x
        y = self.drop(self.norm(self.gru(x)[0].transpose(1, 2)).transpose(1, 2))
        return y.mean(1) if self.refused else y


def picture(module):
    return {
        "training": [part.training for part in module.modules()],
        "names": [sorted(part.__dict__) for part in module.modules()],
        "hooks": [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()],
        "needs": [parameter.requires_grad for parameter in module.parameters()],
        "history": list(module.history),
    }


@pytest.mark.parametrize("refused", [False, True])
def test_the_module_is_left_as_it_was(refused):
    module = Model(refused=refused)
    module.norm.eval()
    module.gru.weight_hh_l0.requires_grad_(False)
    handle = module.register_forward_hook(lambda *_: None)
    before, values = picture(module), {name: value.clone() for name, value in module.state_dict().items()}
    identities = [id(parameter) for parameter in module.parameters()]
    loggers = logging.getLogger("torch.export").level
    random, grad = torch.random.get_rng_state(), torch.is_grad_enabled()
    if refused:
        with pytest.raises(CaptureError, match="mean over time"):
            capture(module, torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)))
    else:
        model = capture(module, torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)))
        model.reference(model.example)
    assert picture(module) == before
    assert [id(parameter) for parameter in module.parameters()] == identities
    assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
    assert not torch_modules._global_forward_hooks
    assert not torch_modules._global_forward_pre_hooks
    assert torch.is_grad_enabled() is grad
    assert torch.equal(torch.random.get_rng_state(), random)
    assert logging.getLogger("torch.export").level == loggers
    handle.remove()


def test_nothing_is_said(capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        capture(nn.LSTM(4, 6, proj_size=3, batch_first=True), torch.randn(2, 5, 4))
    assert caught == []
    assert capfd.readouterr() == ("", "")


def test_the_graph_tells_nothing_of_the_machine():
    model = capture(Model(), torch.randn(2, 5, 4))
    text = model.proto.SerializeToString()
    for trace in (b".py", b"stack_trace", b"site-packages", __file__.encode()):
        assert trace not in text
    provenance = model.spec.provenance
    assert provenance.module.endswith(".Model")
    assert (provenance.opset, provenance.ir_version) == (20, 10)
    assert provenance.parameters == sum(parameter.numel() for parameter in Model().parameters())
    assert provenance.exported_at.endswith("Z")
    assert dict(model.spec.operations)["GRU"] == 2


def test_node_names_are_the_same_every_time():
    module, example = Model(), torch.randn(2, 5, 4)
    first, second = (capture(module, example).proto.graph for _ in range(2))
    assert [node.name for node in first.node] == [node.name for node in second.node]
    assert len({node.name for node in first.node}) == len(first.node)


def test_non_finite_inputs_are_the_callers_choice():
    module, example = nn.GRU(4, 5, batch_first=True), torch.randn(2, 5, 4)
    assert capture(module, example, allow_non_finite_inputs=True).spec.allow_non_finite_inputs
    assert not capture(module, example).spec.allow_non_finite_inputs
