"""Trains and exports the demo's models into a folder, without serving them: `python -m examples.prepare models`.

What is there already is left as it is, so that a second run costs nothing.
"""

import argparse
from pathlib import Path

import torch

from examples._demo import show
from examples._demo.recipes import CHARLM, CO2, exported
from examples._demo.trained import Network, Recipe, trained


def prepare(models: Path) -> None:
    """Leaves `charlm` and `co2` in `models`, trained and verified. Half a minute to minutes, the first time."""
    # A second thread gains a third on an idle machine and loses ten times on a busy one: the threads wait by spinning.
    torch.set_num_threads(1)
    _prepare(CHARLM, models)
    _prepare(CO2, models)


def _prepare(recipe: Recipe[Network], models: Path) -> None:
    if (models / recipe.name / "1" / "model.onnx").exists():
        show.say(f"  {recipe.name}: already in {models}")
        return
    folder = exported(recipe, trained(recipe), models)
    show.say(f"  {recipe.name}: exported and verified, in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, help="folder for them: NAME/VERSION/model.onnx")
    prepare(parser.parse_args().models)
