"""Silences what torch says while it exports, and only that: none of it is about the user's module."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Category and start of the message, each with its reason.
_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    # nn.RNNBase holds its weights in a list besides, which export takes for a change of the module.
    (UserWarning, r"The tensor attributes? "),
    # torch.export uses its own deprecated names.
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)`"),
    (FutureWarning, r"`treespec`"),
    (DeprecationWarning, r""),
    # Axis names of the intermediate program; the graph's own are set afterwards.
    (UserWarning, r"# The axis name"),
    (UserWarning, r"# 'dynamic_axes'"),
    # The weights are taken from the observed call instead.
    (UserWarning, r"RNN module weights are not part of single contiguous chunk"),
    # Torch's CPU library lacks projections and falls back; the answers are the same.
    (UserWarning, r"LSTM with projections is not supported with oneDNN"),
    (UserWarning, r"While exporting, we found certain side effects"),
)
# torchvision's operators are missing: a recurrent model has none. Failed traces are raised as errors.
_LOGGERS = (
    "torch.onnx._internal.exporter._registration",
    "torch.onnx._internal.exporter",
    "torch.export",
    "torch._export",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
)


@contextmanager
def quiet() -> Iterator[None]:
    """No known warning or log line of torch's exporters; the levels of its loggers are restored."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for category, message in _WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
