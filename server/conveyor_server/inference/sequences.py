"""Sequences: correlation ids of the protocol, each an ordinary session.

A sequence begins with a request that says so, goes on with others of its id, and ends with one that says so. Its
session bears its name (`session_id`), and anyone may look at it, fork it or close it there; steps are numbered here.

Invariants: requests of a sequence are run and answered in the order in which they came, whatever stream or call each
came by; a request that cannot be used moves nothing and the sequence goes on; a sequence that is not here is refused
with the reason, and never begun from zeros; of a sequence without a request under way, nothing is kept but its session.
"""

from conveyor_server.inference.job import Job
from conveyor_server.inference.names import session_id
from conveyor_server.inference.sequence import Place, Sequence
from conveyor_server.inference.statistics import Statistics
from conveyor_server.servicers.core import Core


class Sequences:
    """All sequences that have requests under way. Core thread only.

    Args:
        core: what drives the sessions.
        statistics: counts what is read.
    """

    def __init__(self, core: Core, statistics: Statistics) -> None:
        self._core = core
        self._statistics = statistics
        self._busy: dict[str, Sequence] = {}

    def run(self, job: Job) -> Place:
        """Takes a request of a model with state, which names its sequence; the core is to be kicked."""
        sequence = job.parameters.sequence
        if sequence is None:
            raise AssertionError("a request of no sequence")
        name = job.caller.full_name(session_id(job.request.model_name, sequence))
        known = self._busy.get(name)
        if known is None:
            known = self._busy[name] = Sequence(self._core, self._statistics, sequence, name, self._done)
        return known.add(job)

    def _done(self, name: str) -> None:
        del self._busy[name]
