"""model.yaml is read strictly: what is not known, twice or of the wrong kind is an error that says what to write."""

from pathlib import Path

import pytest
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.description import (
    MAX_BYTES,
    Constant,
    Description,
    Input,
    Output,
    Start,
    State,
    Window,
    parse_description,
    read_description,
)
from conveyor_server.runner.strict_yaml import NotStrict

WHOLE = """
conveyor: 1
batch: dynamic
inputs:
  input: {batch_axis: 0, shape: [512], window: {size: 64, axis: 1}}
  on: {batch_axis: 1, time_axis: 0}
outputs:
  output: {batch_axis: 0, time_axis: 1, shape: []}
states:
  - {input: state, output: stateN, batch_axis: 1}
  - {input: "12", output: "13", name: memory, batch_axis: 0, shape: [2], initial: [0.5, -1]}
constants:
  sr: 16000
  lens: {value: [45], batch_axis: 0}
starts:
  START: {first: 1.0, later: 0.0, batch_axis: 0}
allow_non_finite_inputs: true
"""
SMALL = "conveyor: 1\ninputs: {x: {batch_axis: 0}}\noutputs: {y: {batch_axis: 0}}\n"


def test_every_key() -> None:
    assert parse_description(WHOLE.encode()) == Description(
        inputs=(
            Input("input", batch_axis=0, shape=(512,), window=Window(64, 1)),
            Input("on", batch_axis=1, time_axis=0),
        ),
        outputs=(Output("output", batch_axis=0, time_axis=1, shape=()),),
        states=(
            State("state", "state", "stateN", batch_axis=1),
            State("memory", "12", "13", batch_axis=0, shape=(2,), initial=[0.5, -1]),
        ),
        constants=(Constant("sr", 16000), Constant("lens", [45], batch_axis=0)),
        starts=(Start("START", 1.0, 0.0, batch_axis=0),),
        batch="dynamic",
        allow_non_finite_inputs=True,
    )


def test_one_row_needs_no_axis_of_rows() -> None:
    text = "conveyor: 1\nbatch: one\ninputs: {x: {}}\noutputs: {y: {time_axis: 1}}\nstates: [{input: a, output: b}]"
    described = parse_description(text.encode())
    assert (described.batch, described.states[0].batch_axis, described.outputs[0].time_axis) == ("one", None, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file takes names with what belongs to them, and nothing is there"),
        ("- 1", "the file takes names with what belongs to them, and [1] is there"),
        ("inputs: {}", "conveyor is missing"),
        (SMALL.replace("conveyor: 1", "conveyor: 2"), "conveyor: 2 is not a version of this file that is known here"),
        (SMALL + "state: []", "the file has 'state', which is not known; did you mean 'states'?"),
        (SMALL.replace("batch_axis", "batch_axes"), "inputs.x has no batch_axis: say which axis"),
        (
            SMALL.replace("x: {", "x: {windows: 1, "),
            "has 'windows', which is not known; did you mean 'window'?",
        ),
        (SMALL.replace("x: {", "x: {colour: 1, "), "inputs.x has 'colour', which is not known; known are batch_axis"),
        (SMALL + "batch: many", "batch takes dynamic or company or one, and 'many'"),
        (SMALL.replace("x: {batch_axis: 0", "x: {batch_axis: -1"), "inputs.x.batch_axis is -1: it is to be 0 or more"),
        (SMALL.replace("x: {batch_axis: 0", "x: {batch_axis: true"), "takes whole numbers, and True is there"),
        (SMALL.replace("x: {", "x: {time_axis: 0, "), "axis 0 cannot count both rows and time steps"),
        (SMALL.replace("x: {", "x: {window: {size: 1, axis: 0}, "), "axis 0 counts rows; a window lies along another"),
        (SMALL.replace("x: {", "x: {window: {size: 0, axis: 1}, "), "inputs.x.window.size is 0: it is to be 1 or more"),
        (SMALL.replace("x: {", "x: {window: {size: 1, axis: 1, of: 2}, "), "inputs.x.window has 'of'"),
        (SMALL.replace("x: {", "x: {shape: 5, "), "inputs.x.shape takes a list such as [512], and 5 is there"),
        (SMALL.replace("x: {", "x: {shape: [0], "), "inputs.x.shape is 0: it is to be 1 or more"),
        (SMALL.replace("x: {", f"x: {{shape: {[1] * 17}, "), "has 17 axes; at most 16 are taken"),
        (SMALL.replace("{x: {batch_axis: 0}}", "{}"), "inputs is empty: a model that is stepped takes something"),
        (SMALL.replace("outputs: {y: {batch_axis: 0}}", ""), "outputs is missing"),
        (SMALL + "states: {a: b}", "states takes a list, and {'a': 'b'} is there"),
        (SMALL + "states: [{output: b, batch_axis: 0}]", "states[0].input is missing"),
        (
            SMALL + "states: [{input: 1, output: b, batch_axis: 0}]",
            "states[0].input takes a name, and 1 is there",
        ),
        (SMALL + "states: [{input: x, output: b, batch_axis: 0}]", "graph input 'x' is there twice"),
        (
            SMALL + "states: [{input: a, output: c, batch_axis: 0}, {input: b, output: c, batch_axis: 0}]",
            "graph output 'c' is there twice: it is the new value of one state only",
        ),
        (
            SMALL + "states: [{input: a, output: c, batch_axis: 0}, {input: b, output: d, name: a, batch_axis: 0}]",
            "state 'a' is there twice",
        ),
        (SMALL + "states: [{input: a, output: c, batch_axis: 0, initial: .nan}]", "initial takes a finite number"),
        (SMALL + "states: [{input: a, output: c, batch_axis: 0, initial: none}]", "takes a finite number or a list"),
        (SMALL + "constants: {x: 1}", "graph input 'x' is there twice: it is an input, a state, a constant or a start"),
        (SMALL + "constants: {sr: fast}", "constants.sr takes a finite number or a list of them, and 'fast' is there"),
        (SMALL + "constants: {sr: {batch_axis: 0}}", "constants.sr.value takes a finite number"),
        (SMALL + "allow_non_finite_inputs: 1", "allow_non_finite_inputs takes true or false, and 1 is there"),
        (SMALL + "inputs: {}", "'inputs' is there twice: keep one"),
        (SMALL + "constants: {a: &a [1], b: *a}", "aliases are not taken: write it out"),
        (SMALL + "constants: {[1]: 2}", "a key is a name"),
        (SMALL + "constants: {", "it is not YAML"),
        (SMALL + "constants: {a: " + "[" * 5000 + "]" * 5000 + "}", "its lists lie too deep in each other"),
        (SMALL + "# " + "x" * MAX_BYTES, f"it has more than {MAX_BYTES} bytes"),
    ],
)
def test_what_is_wrong_is_said(text: str, told: str) -> None:
    with pytest.raises(NotStrict) as caught:
        parse_description(text.encode())
    assert told in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunnerUnavailable, match=r"model\.yaml: it is not YAML"):
        read_description(tmp_path / "model.yaml")
    with pytest.raises(RunnerUnavailable, match=r"none\.yaml cannot be read: No such file"):
        read_description(tmp_path / "none.yaml")
