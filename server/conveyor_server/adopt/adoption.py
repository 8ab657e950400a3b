"""A file is described, tried and proved: all of `conveyor adopt` but its command line and its files.

Invariant: an Adoption has held in its proof, within the tolerance that was given.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from conveyor_proto.spec import METADATA_KEY

from conveyor_server.adopt.answers import Answers, Refused
from conveyor_server.adopt.probe import Probe
from conveyor_server.adopt.propose import propose
from conveyor_server.adopt.prove import Proof, prove
from conveyor_server.adopt.sample import read_example
from conveyor_server.runner.description import Description
from conveyor_server.runner.fitting import fit
from conveyor_server.runner.plain import PlainSession
from conveyor_server.runner.step_file import read_graph


@dataclass(frozen=True, slots=True)
class Adoption:
    """A description that has been proved.

    Attributes:
        proto: the file's own graph.
        description: of it.
        reasons: state's graph input -> why it is one.
        proof: what was found.
        rows: why a run is one row, or never one alone, in a sentence; empty where it takes any number.
    """

    proto: onnx.ModelProto
    description: Description
    reasons: Mapping[str, str]
    proof: Proof
    rows: str


def adopt(path: Path, answers: Answers, *, example: Path | None = None, tolerance: float = 0.0) -> Adoption:
    """Describes a file and proves it. Blocks for seconds.

    Args:
        path: the file.
        answers: what is known of it.
        example: time steps for the proof, as of `read_example`; None: random ones.
        tolerance: how far answers may be from the file's own where rows are served together.

    Raises:
        Asked: something could be otherwise.
        Refused: it cannot be served, or what is served is not what the file gives.
        RunnerUnavailable: the file cannot be read, or onnxruntime does not load it.
    """
    proto, _ = read_graph(path)
    if any(item.key == METADATA_KEY for item in proto.metadata_props):
        raise Refused(f"{path.name} was exported by Conveyor and describes itself: put it into NAME/VERSION/model.onnx")
    proposal = propose(proto, answers)
    names = [item.name for item in proposal.description.inputs]
    given = {} if example is None else read_example(example, names)
    session = PlainSession(path)
    description, fails = Probe(proto, session, proposal.outputs, given).outputs(proposal.description)
    description = _sized(proto, description)
    one_row = proposal.one_row or fails
    rows = f"Row by row: {one_row}." if one_row else ""
    proof = prove(proto, path, session, description, given)
    if proof.worst > 0 and description.batch == "dynamic":
        apart = f"rows together differ from each alone by up to {proof.worst:.2g}"
        other = replace(description, batch="one" if proof.worst > tolerance else "company")
        if other.batch == "one" and answers.batch is None:
            rows = f"Row by row: {apart}, and --tolerance {_above(proof.worst)} would accept that."
            description, proof = other, prove(proto, path, session, other, given)
        elif other.batch == "company":
            beside = prove(proto, path, session, other, given)
            if beside.exact:
                rows = f"In company: {apart}, but not from each beside an empty row."
                description, proof = other, beside
            else:
                rows = f"Accepted: {apart}, and the last bits depend on how many they are."
    if proof.worst > tolerance:
        told = ", ".join(f"{name} by {difference:.3g}" for name, difference in proof.differing.items())
        raise Refused(
            f"what would be served is not what the file gives: {told}. If that is near enough, say --tolerance "
            f"{_above(proof.worst)}"
        )
    return Adoption(proto, description, proposal.reasons, proof, rows)


def _above(difference: float) -> str:
    """A short number that is no smaller."""
    return f"{difference * 1.06:.1e}"


def _sized(proto: onnx.ModelProto, description: Description) -> Description:
    """The description with the shapes that the graph has, so that the file says all of them."""
    fitted = fit(proto, description)
    shapes = {layout.name: layout.shape for layout in fitted.inputs}
    rows = {pair.state.input: pair.layout.shape for pair in fitted.pairs}
    return replace(
        description,
        inputs=tuple(replace(item, shape=shapes[item.name]) for item in description.inputs),
        states=tuple(replace(item, shape=rows[item.input]) for item in description.states),
    )
