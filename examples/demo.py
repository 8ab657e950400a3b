"""`make demo`: two models, trained, exported, served and streamed. `run` is the story; the rest is in `_demo`."""

import os

# onnxruntime reads it when it is imported, so before anything that might import it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import sys
import time
from pathlib import Path

import conveyor
import torch

from examples import charlm
from examples._demo import show
from examples._demo.crowd import stream_crowd
from examples._demo.forecast import stream_forecast
from examples._demo.next_steps import next_steps
from examples._demo.recipes import CHARLM, CO2, exported
from examples._demo.server import Server
from examples._demo.text import stream_text
from examples._demo.trained import trained

MODELS = Path("models")
LOG = Path(".cache") / "demo" / "server.log"


def run() -> None:
    show.title("1. Train: an LSTM on Python's own documentation, a GRU on 40 years of CO2")
    # A second thread gains a third on an idle machine and loses ten times on a busy one: the threads wait by spinning.
    torch.set_num_threads(1)
    language, climate = trained(CHARLM), trained(CO2)
    show.say(f"  charlm: {charlm.bits_per_character(language):.2f} bits per character on text that it has not seen")

    show.title("2. Export: the state comes out of forward(), and every way of feeding it is verified against PyTorch")
    exported(CHARLM, language, MODELS)
    exported(CO2, climate, MODELS)

    show.title("3. Serve: the state of every session stays on the server")
    with Server(MODELS, LOG) as server, conveyor.connect(server.target) as client:
        show.say(f"  conveyor {' '.join(server.command)}")

        show.title("4. Stream text: a token up, its logits down, the next token is drawn from them")
        differences = {"charlm, token by token": stream_text(client, language)}

        show.title("5. Stream readings: next week's CO2 from a chunk of history, then week by week")
        differences["co2, week by week"] = stream_forecast(client, climate)

        show.title("6. Many sessions at once: whoever is ready is stepped together")
        differences["charlm, in company"] = stream_crowd(client, server, language)

    show.title("7. The worst difference from PyTorch, which was given each whole sequence at once")
    for what, difference in differences.items():
        show.say(f"  {what:<24} {difference:.1e}")
    show.say("  (two neighbouring float32 are 3.1e-05 apart at 370 ppm)")
    next_steps()


def main() -> int:
    start = time.perf_counter()
    try:
        run()
    except KeyboardInterrupt:
        show.say("\nstopped")
        return 130
    except Exception as error:  # the demo's promise: whatever it is, one message
        print(f"\ndemo: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    show.say(f"\ndone in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
