"""Text that appears as the server answers: one token there, one set of logits back, the next token drawn here."""

import time

import conveyor
import numpy as np
import torch
from numpy.typing import NDArray

from examples import charlm
from examples._demo import show

PROMPT = "The "
CHARACTERS = 480
TEMPERATURE = 0.5
SEED = 5


def stream_text(client: conveyor.Client, network: charlm.CharLM) -> float:
    """Prints generated text; returns the largest difference from PyTorch over the whole sequence."""
    chance = np.random.default_rng(SEED)
    sent = charlm.encode(PROMPT).tolist()
    writer = show.Typewriter()
    with client.session("charlm") as session:
        writer.start()
        writer.write(PROMPT)
        # The prompt is a chunk, [time] in and [time, characters] out; from there on it is one token at a time.
        answers = list(session.step(np.array(sent)))
        start = time.perf_counter()
        for _ in range(CHARACTERS):
            token = draw(answers[-1], chance)
            writer.write(charlm.decode(token))
            answers.append(session.step(np.int64(token)))
            sent.append(token)
        elapsed = time.perf_counter() - start
    writer.end()
    show.say(
        f"  {CHARACTERS} tokens, each sent after the answer to the one before: "
        f"{elapsed / CHARACTERS * 1000:.2f} ms a token, {CHARACTERS / elapsed:,.0f} tokens per second"
    )
    with torch.no_grad():
        whole = network(torch.tensor([sent]))[0].numpy()
    return float(np.abs(np.stack(answers) - whole).max())


def draw(logits: NDArray[np.float32], chance: np.random.Generator) -> int:
    """A token by its probability at TEMPERATURE."""
    scaled = logits.astype(np.float64) / TEMPERATURE
    weights = np.exp(scaled - scaled.max())
    return int(chance.choice(len(weights), p=weights / weights.sum()))
