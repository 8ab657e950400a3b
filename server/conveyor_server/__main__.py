"""`conveyor serve`: arguments -> Settings -> App."""

import os

# onnxruntime reads it when it is imported, so before anything that might import it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import asyncio
import logging
import sys
from collections.abc import Sequence

from conveyor_server import settings as settings_module
from conveyor_server.errors import StartError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a server until it is told to stop; returns the exit status.

    Args:
        arguments: flags, without the program's name; None takes the process's.
    """
    try:
        settings = settings_module.load(sys.argv[1:] if arguments is None else arguments, os.environ)
        logging.basicConfig(
            level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
        )
        return asyncio.run(_serve(settings))
    except StartError as error:
        print(f"conveyor serve: {error}", file=sys.stderr)
        return 2


async def _serve(settings: settings_module.Settings) -> int:
    # Here, so that --help and a wrong flag answer without loading onnxruntime.
    try:
        from conveyor_server.app import App
    except ModuleNotFoundError as error:
        raise StartError(f"{error}: install the server with pip install 'conveyor[server]'") from error
    app = App(settings)
    status = await app.run()
    if app.stuck:
        # Python would wait for the thread of the run that does not come back.
        logging.shutdown()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
