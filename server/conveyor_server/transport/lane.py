"""What the driver keeps for an engine: its thread and its figures.

Invariant: a run on its thread is the only one of that engine.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from conveyor_server.engine.engine import Engine
from conveyor_server.metrics import ModelFigures


class Lane:
    """Core thread only.

    Args:
        engine: whose runs they are.
        figures: of its model version.
    """

    def __init__(self, engine: Engine, figures: ModelFigures) -> None:
        self.figures = figures
        # Its next run was put off once, for what came during a turn.
        self.waived = False
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"engine-{engine.model}-{engine.version}")
        # Set while no batch is out and nothing is ready.
        self.idle = asyncio.Event()
        self.idle.set()
