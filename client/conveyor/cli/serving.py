"""The commands that change what a server serves: models load, models unload."""

import argparse

from conveyor.cli.commands import connected, model_json, print_json


def load(arguments: argparse.Namespace) -> int:
    """`conveyor models load`."""
    with connected(arguments) as client:
        model = client.load_model(arguments.name, arguments.version, reload=arguments.reload)
    if arguments.json:
        print_json(model_json(model))
        return 0
    checked = (
        f"checked by {model.checked_vectors} verifier vectors"
        if model.checked_vectors
        else "not checked: its file holds no verifier vectors"
    )
    latest = "" if model.latest else ", and is not the latest"
    print(f"{model.name} {model.version} is served on {model.device}, {checked}{latest}")
    if model.failure:
        print(f"what is in its file now is not: {model.failure}")
    return 0


def unload(arguments: argparse.Namespace) -> int:
    """`conveyor models unload`."""
    with connected(arguments) as client:
        closed = client.unload_model(arguments.name, arguments.version, force=arguments.force)
    if arguments.json:
        print_json({"model": arguments.name, "version": arguments.version, "closed_sessions": closed})
        return 0
    print(f"{arguments.name} {arguments.version} is not served any more, {closed} sessions closed")
    return 0
