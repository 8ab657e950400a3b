"""Every block of README.md and docs/quickstart.md does what it says: it is run, or shown by a test that is named here.

A block that is new has no row in HOW, and this fails until it has one.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import silero
from blocks import Block, Machine, blocks
from valkey_process import ValkeyProcess, free_port

PAGES = ("README.md", "docs/quickstart.md")


@dataclass(frozen=True)
class Run:
    """In a shell, line by line; each ends with one of the statuses."""

    statuses: tuple[int, ...] = (0,)
    prints: str = ""


@dataclass(frozen=True)
class Write:
    """To a file, which a later block uses."""


@dataclass(frozen=True)
class Python:
    """After lines that make what it is given."""

    before: str


@dataclass(frozen=True)
class Make:
    """`make -n`: the target is there, and so is all that it needs. What it does is done by whoever runs the tests."""


@dataclass(frozen=True)
class Pip:
    """Each extra is one; that it installs is shown by a test of the wheel."""

    shown_by: str = "tests/packaging/test_wheels.py"


_GIVEN = """
import conveyor, numpy as np
client = conveyor.connect("localhost:50051")
for name in ("keywords", "meter"):
    client.load_model(name)
x, frames, readings = (np.ones(shape, np.float32) for shape in ((4,), (9, 4), (500, 4)))
"""

HOW = {
    ("README.md", "make demo"): Make(),
    ("README.md", "source .venv/bin/activate"): Run(),
    ("README.md", "make test"): Make(),
    ("README.md", "conveyor export my_package.models:KeywordSpotter --weights state.pt \\"): Run(),
    (
        "README.md",
        "conveyor adopt silero_vad.onnx --name vad --batch-axis input=0 --shape input=512 --window input=64 "
        "--constant sr=16000",
    ): Run(),
    ("README.md", "import conveyor"): Python(_GIVEN),
    ("README.md", "conveyor serve --store sqlite:sessions.db"): Run(),
    ("README.md", 'with client.session("keywords", session_id="line-7", durability="async") as session:'): Python(
        _GIVEN
    ),
    ("README.md", "pip install .                  # the SDK: grpcio, protobuf, numpy"): Pip(),
    ("docs/quickstart.md", "pip install '.[server,export,top]'"): Pip(),
    ("docs/quickstart.md", "# spotter.py"): Write(),
    ("docs/quickstart.md", "conveyor export spotter:Spotter --example spotter:example --out models/spotter/1"): Run(),
    # 1: the machine that tests this may have few open files, or a slow disk.
    ("docs/quickstart.md", "conveyor doctor --models models"): Run(statuses=(0, 1)),
    ("docs/quickstart.md", "conveyor models"): Run(prints=r"(?s)step 1 .*step 2 .*first +spotter"),
    ("docs/quickstart.md", "# stream.py"): Write(),
    ("docs/quickstart.md", "python stream.py"): Run(prints=r"^\(2,\)\n\(50, 2\)\n$"),
    ("docs/quickstart.md", "conveyor top --once"): Run(prints=r"spotter +1 +ready cpu +\d"),
    ("docs/quickstart.md", "conveyor serve --store sqlite:sessions.db"): Run(),
    ("docs/quickstart.md", "conveyor step spotter --session kept --input '[1, 2, 3]'"): Run(prints="^step 1 "),
    # The page has it twice: the second time on a session that is there.
    ("docs/quickstart.md", "conveyor serve --store sqlite:sessions.db", 2): Run(prints="^step 2 "),
}

_PACKAGE = """
import torch
from torch import nn


class KeywordSpotter(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 8, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


def example():
    return torch.randn(1, 5, 4)
"""
# What the README's reader has after `make demo`, and brings along.
_MODELS = """
import sys, torch
sys.path[:0] = [sys.argv[1], "."]
from conveyor_export import export
from examples import co2
from my_package.models import KeywordSpotter, example
torch.save(KeywordSpotter().state_dict(), "state.pt")
export(KeywordSpotter().eval(), example(), "models/meter/1", quiet=True)
export(co2.model().eval(), co2.example(), "models/co2/1", quiet=True)
"""


def of(page: str, root: Path) -> list[tuple[tuple[object, ...], Block]]:
    """Blocks of a page with their names in HOW: the page, the first line, and of those that come again which it is."""
    named: list[tuple[tuple[object, ...], Block]] = []
    for block in blocks(page, (root / page).read_text()):
        again = sum(each.name == block.name for _, each in named) + 1
        named.append(((page, block.name, again) if again > 1 else (page, block.name), block))
    return named


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    store = tmp_path / "valkey"
    store.mkdir()
    work = tmp_path / "work"
    work.mkdir()
    valkey = ValkeyProcess(store)
    made = Machine(work, (free_port(), free_port()), {"10.0.0.5:6379": f"127.0.0.1:{valkey.port}"})
    try:
        yield made
        made.stop()
    finally:
        made.end()
        valkey.kill()


def test_every_block_is_run_or_shown(root: Path) -> None:
    assert [name for page in PAGES for name, _ in of(page, root)] == list(HOW)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_do_what_they_say(page: str, root: Path, machine: Machine) -> None:
    if page == "README.md":
        _bring(root, machine.folder)
    for name, block in of(page, root):
        match HOW[name]:
            case Run(statuses, prints):
                assert re.search(prints, machine.run(block, statuses)), name
            case Write():
                machine.write(block)
            case Python(before):
                machine.run_python(block, before)
            case Make():
                for line in block.lines():
                    done = subprocess.run([*line.split(), "-n"], cwd=root, capture_output=True, text=True, check=False)
                    assert done.returncode == 0, done.stderr
            case Pip(shown_by):
                _check_extras(block, root, shown_by)


def _bring(root: Path, folder: Path) -> None:
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "my_package").mkdir()
    (folder / "my_package" / "models.py").write_text(_PACKAGE)
    shutil.copy(silero.fetch().onnx(), folder)
    done = subprocess.run(
        [sys.executable, "-c", _MODELS, str(root)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _check_extras(block: Block, root: Path, shown_by: str) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in block.lines():
        match = re.fullmatch(r"pip install '?\.(?:\[([\w,-]+)\])?'?", line)
        assert match, line
        assert set((match[1] or "").split(",")) - {""} <= set(extras), line
    assert "environment.install(" in (root / shown_by).read_text()


def test_blocks_are_found_as_markdown_has_them() -> None:
    text = (
        "words\n\n    one \\\n        --two  # said\n\n    three\n\nmore\n\n```python\nx = 1\n\n    y\n```\n\n    last"
    )
    found = list(blocks("p", text))
    assert [(each.language, each.name) for each in found] == [("", "one \\"), ("python", "x = 1"), ("", "last")]
    assert found[0].lines() == ["one --two", "three"]


def test_a_command_that_fails_and_a_server_that_does_not_start_are_seen(machine: Machine) -> None:
    for text, words in (("false", "false"), ("conveyor serve --models gone", "models' folder")):
        with pytest.raises(AssertionError, match=words):
            machine.run(Block("p", "", text))
