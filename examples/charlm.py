r"""A character language model as anyone would write it: nothing in here knows about serving.

The hidden and cell state are made inside `forward`, where they are hard to reach; `conveyor export` lifts them out.
Trained on the documentation that ships inside every Python, so nothing has to be downloaded.

    conveyor export examples.charlm:model --weights charlm.pt --example examples.charlm:example --tolerance 1e-4 \
        --out models/charlm/1
"""

import math
import pydoc_data.topics
import string
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

# Fixed, so that the model's shape does not follow the Python version that trained it.
CHARACTERS = "\n" + string.printable[:95]
_FOLDED = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."})

STEPS = 900
BATCH = 32
CHUNK = 96
HELD_OUT = 0.04


class CharLM(nn.Module):
    """Predicts the next character: `[batch, time]` int64 in, logits `[batch, time, len(CHARACTERS)]` float32 out."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), 64)
        self.lstm = nn.LSTM(64, hidden, batch_first=True)
        self.head = nn.Linear(hidden, len(CHARACTERS))

    def forward(self, characters: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(characters))
        logits: Tensor = self.head(hidden)
        return logits


def model() -> CharLM:
    """The factory that `conveyor export` calls."""
    return CharLM()


def example() -> tuple[Tensor]:
    """Inputs of the kind that the model will see, for the exporter's verifier."""
    return (encode("The with statement is used to wrap the execution of a block").unsqueeze(0),)


def encode(text: str) -> Tensor:
    """`[time]` int64; characters that the model does not know are left out."""
    return torch.tensor([CHARACTERS.index(c) for c in text.translate(_FOLDED) if c in CHARACTERS])


def decode(index: int) -> str:
    return CHARACTERS[index]


@cache
def corpus() -> tuple[Tensor, Tensor]:
    """The text to train on and the text held out, `[time]` int64 each.

    The documentation repeats itself word for word from topic to topic, so each paragraph counts once: otherwise the
    held-out text would be text that the model has seen. Prose only: grammar, code and tables end in no full stop.
    """
    topics = pydoc_data.topics.topics
    paragraphs = (" ".join(text.split()) for name in sorted(topics) for text in topics[name].split("\n\n"))
    text = encode("\n".join(dict.fromkeys(text for text in paragraphs if text.endswith((".", ":")))))
    split = int(len(text) * (1 - HELD_OUT))
    return text[:split], text[split:]


def train(network: CharLM, progress: Callable[[int, float], None]) -> None:
    """Trains in place on random chunks; `progress(step, bits per character)` is called after each of STEPS steps."""
    text, _ = corpus()
    network.train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.4e-2, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        starts = torch.randint(len(text) - CHUNK - 1, (BATCH, 1), generator=generator)
        chunk = text[starts + torch.arange(CHUNK + 1)]
        logits = network(chunk[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item() / math.log(2))


def bits_per_character(network: CharLM) -> float:
    """On the held-out text, as one sequence."""
    _, text = corpus()
    network.eval()
    with torch.no_grad():
        logits = network(text[:-1].unsqueeze(0))[0]
    return functional.cross_entropy(logits, text[1:]).item() / math.log(2)
