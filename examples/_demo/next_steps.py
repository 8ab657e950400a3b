"""Where to look next: commands that work once the demo has run."""

from examples._demo import show

_NEXT = """
  conveyor serve                                   serves models/ on localhost:50051
  conveyor models                                  what it serves
  conveyor inspect models/charlm/1                 what is in a model: states, layers, the verifier's figures
  conveyor step co2 --session mine --input 371.5   one step of a session; give the next reading the same way
  conveyor serve --store sqlite:sessions.db        the same, and sessions go on where they were after kill -9
  conveyor sessions                                who is there: steps taken, steps stored, in memory or not
  curl localhost:9464/metrics                      what it counts
  docker compose up --wait                         the same in containers, with Prometheus on localhost:9090

  examples/quickstart.py   export, serve and stream in 20 lines
  examples/charlm.py       the module that was just served; nothing in it knows of serving
  docs/architecture.md     how a token travels          docs/export.md     what can be exported
  docs/protocol.md         the rules of a session       docs/metrics.md    every metric
  docs/durability.md       what is left of a session when something breaks
"""


def next_steps() -> None:
    show.title("Where to look next (after: source .venv/bin/activate)")
    show.console.print(_NEXT.strip("\n"), markup=False)
