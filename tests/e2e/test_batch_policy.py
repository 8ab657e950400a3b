"""The batch policy of the real server: measured where nothing is given, and told."""

import json
import re

import conveyor
import numpy as np
from conveyor.cli import main as cli


def test_what_is_chosen_is_measured_told_and_logged(start_server):
    server = start_server()
    with conveyor.connect(server.target) as client:
        policies = {model.name: model.batch_policy for model in client.models()}
    assert policies.keys() == {"lstm", "gru", "rnn", "speller"}
    for name, policy in policies.items():
        assert policy.given == ()
        took = {(item.rows, item.time_steps): item.run_s for item in policy.measured}
        assert {(1, 1), (8, 1), (32, 1), (128, 1), (1, 4), (1, 16)} <= took.keys()
        assert all(0 < run_s < 1 for run_s in took.values())
        assert policy.inline_run_s == 0.004
        # Sixteen units: a run costs the call, so many sessions share it.
        assert policy.max_batch >= 64, name
        assert policy.max_batch_time_steps >= policy.max_batch
        assert policy.quantum >= 4
    said = re.findall(
        r"serving (\w+)/1 on cpu: .* max_batch (\d+), quantum (\d+), max_batch_time_steps (\d+), ",
        server.log.read_text(),
    )
    assert {name: tuple(map(int, bounds)) for name, *bounds in said} == {
        name: (policy.max_batch, policy.quantum, policy.max_batch_time_steps) for name, policy in policies.items()
    }


def test_what_is_given_is_taken_and_marked(start_server, nets, capsys):
    server = start_server("--max-batch", "4", "--inline-run-s", "0", "--quantum", "auto")
    assert cli.main(["models", "--target", server.target]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("") + 1
    assert lines[at].split()[:4] == ["MODEL", "VERSION", "MAX", "BATCH"]
    for line in lines[at + 1 :]:
        assert re.match(r"\w+ +1 +4 \(given\) +\d+ +\d+ +none \(given\) +1: .*, 4: ", line)
    assert cli.main(["models", "--json", "--target", server.target]) == 0
    policies = [model["batch_policy"] for model in json.loads(capsys.readouterr().out)]
    assert [(policy["max_batch"], policy["given"]) for policy in policies] == [(4, ["inline_run_s", "max_batch"])] * 4

    x = np.random.default_rng(3).standard_normal((16, 4)).astype(np.float32)
    with conveyor.connect(server.target) as client, client.population("lstm", 16) as many:
        answers = many.step(x)
    for row in range(16):
        assert np.abs(answers[row] - nets.truth("lstm", x[row : row + 1])[0]).max() < 1e-5
    rows = re.findall(
        r'conveyor_batch_rows_bucket\{le="4.0",model="lstm",version="1"\} (\d+)', server.get("/metrics")[1]
    )
    count = re.findall(r'conveyor_batch_rows_count\{model="lstm",version="1"\} (\d+)', server.get("/metrics")[1])
    assert rows == count
    assert int(count[0]) >= 4, "sixteen sessions, four at a time"
