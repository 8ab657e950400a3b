"""The demo's two models: how they are made, and where they go."""

from pathlib import Path

import conveyor_export

from examples import charlm, co2
from examples._demo.trained import Network, Recipe

# The verifier's default of 1e-5 is for values of unit scale: charlm's cell state reaches 50, and ppm are some 370.
TOLERANCE = 1e-4

CHARLM = Recipe(
    name="charlm",
    code=charlm,
    model=charlm.model,
    train=charlm.train,
    steps=charlm.STEPS,
    data=charlm.corpus,
    loss=lambda bits: f"{bits:.2f} bits per character",
)
CO2 = Recipe(
    name="co2",
    code=co2,
    model=co2.model,
    train=co2.train,
    steps=co2.STEPS,
    data=lambda: [co2.series()],
    loss=lambda square: f"error {square**0.5:.2f} ppm",
)


def exported(recipe: Recipe[Network], network: Network, models: Path) -> Path:
    """Exports a trained network, verified, as version 1 under `models`; returns its folder."""
    folder = models / recipe.name / "1"
    conveyor_export.export(network, recipe.code.example(), folder, tolerance=TOLERANCE, overwrite=True)
    return folder
