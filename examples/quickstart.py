"""Export, load, stream: run `conveyor serve` in this folder first, then `python -m examples.quickstart`."""

import conveyor
import conveyor_export
import numpy as np
import torch
from torch import Tensor, nn


class Tagger(nn.Module):
    """Untrained, and otherwise a module as you have one: its state is made inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.lstm(x)[0])
        return scores


torch.manual_seed(0)
tagger = Tagger().eval()
conveyor_export.export(tagger, torch.zeros(1, 10, 8), "models/tagger/1", overwrite=True)

x = np.random.default_rng(0).standard_normal((100, 8), dtype=np.float32)
with conveyor.connect("localhost:50051") as client:
    client.load_model("tagger")
    with client.session("tagger") as session:
        answers = [session.step(row) for row in x]  # one time step each; the state stays on the server

whole = tagger(torch.from_numpy(x).unsqueeze(0)).detach().numpy()[0]
print(f"100 steps, largest difference from PyTorch over the whole sequence: {np.abs(answers - whole).max():.1e}")
