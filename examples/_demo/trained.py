"""A trained model, from the cache or from training it now.

Invariant: weights are found again only by the digest of the code and the data that made them.
"""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from examples._demo import show

CACHE = Path(".cache") / "demo"

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Recipe(Generic[Network]):
    """How one of the demo's models is made.

    Attributes:
        name: of the model.
        code: the file that has it; a change of it trains anew.
        model: makes the untrained module.
        train: trains it in place and calls back with the step and the loss.
        steps: how many steps that takes.
        data: what it is trained and tested on.
        loss: how a loss reads.
    """

    name: str
    code: ModuleType
    model: Callable[[], Network]
    train: Callable[[Network, Callable[[int, float], None]], None]
    steps: int
    data: Callable[[], Sequence[Tensor]]
    loss: Callable[[float], str]

    def digest(self) -> str:
        sha = hashlib.sha256(inspect.getsource(self.code).encode())
        for tensor in self.data():
            sha.update(tensor.numpy().tobytes())
        return sha.hexdigest()[:16]


def trained(recipe: Recipe[Network]) -> Network:
    """The trained module, in eval mode."""
    torch.manual_seed(0)
    network = recipe.model()
    weights = CACHE / f"{recipe.name}-{recipe.digest()}.pt"
    if weights.exists():
        network.load_state_dict(torch.load(weights, weights_only=True))
        show.say(f"  {recipe.name}: trained earlier, weights from {weights}")
    else:
        with show.progress(f"{recipe.name:<7}", recipe.steps) as report:
            recipe.train(network, lambda step, loss: report(step, recipe.loss(loss)))
        _save(network, weights)
    return network.eval()


def _save(network: nn.Module, weights: Path) -> None:
    """Whole or not at all: an interrupted demo leaves nothing that the next one would take for trained."""
    weights.parent.mkdir(parents=True, exist_ok=True)
    unfinished = weights.with_suffix(".unfinished")
    torch.save(network.state_dict(), unfinished)
    unfinished.replace(weights)
