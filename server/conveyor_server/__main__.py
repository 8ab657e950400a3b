"""`conveyor serve`: arguments -> Settings -> App, or a supervisor of several workers that are each this program."""

import os

# onnxruntime reads it when it is imported, so before anything that might import it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import asyncio
import dataclasses
import logging
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from conveyor_server import configuration, logs
from conveyor_server.errors import StartError
from conveyor_server.settings import Settings
from conveyor_server.supervisor.link import Link, Report
from conveyor_server.supervisor.supervisor import PATIENCE_S, Supervisor

if TYPE_CHECKING:
    from conveyor_server.app import App

_log = logging.getLogger("conveyor")

# Read once, when gRPC is first imported.
_OF_GRPC = {
    # The thread that waits at the completion queue does the sockets' work too, instead of waiting for gRPC's own
    # threads to do it.
    "GRPC_EXPERIMENTS": "-event_engine_listener",
    # A server does not fork, and each look at the queue would ask whether it does.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}


def command(arguments: Sequence[str]) -> int:
    """`conveyor serve`: `main`, in this process, as a program that has not imported gRPC yet.

    The command line is the SDK's, which has, so that gRPC's settings would come too late: an echo costs a third more.

    Args:
        arguments: flags, without the program's name and `serve`.
    """
    if "grpc" in sys.modules and any(name not in os.environ for name in _OF_GRPC):
        _say_to_grpc()
        # -P: what lies in the folder of whoever calls is nobody's module.
        os.execv(sys.executable, [sys.executable, "-P", "-m", "conveyor_server", *arguments])  # noqa: S606 - this program
    return main(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a server until it is told to stop; returns the exit status.

    Args:
        arguments: flags, without the program's name; None takes the process's.
    """
    link = Link.inherited(os.environ)
    try:
        settings = configuration.load(sys.argv[1:] if arguments is None else arguments, os.environ)
        logs.configure(settings.log_format, settings.log_level, None if link is None else link.index)
        if link is not None:
            return _on_transport(settings, lambda: _work(settings, link))
        if settings.workers > 1:
            return asyncio.run(Supervisor(settings, os.environ).run())
        return _on_transport(settings, lambda: _serve(settings))
    except StartError as error:
        if link is not None:
            # The supervisor says it, once.
            link.tell(Report(error=str(error)))
        elif logs.speaks_json():
            _log.critical("%s", error)
        else:
            print(f"conveyor serve: {error}", file=sys.stderr)
        return 2


def _on_transport(settings: Settings, main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    _say_to_grpc()
    # Here, so that --help, a wrong flag and a supervisor do without gRPC and onnxruntime.
    try:
        from conveyor_server.transport.choice import run_with
    except ModuleNotFoundError as error:
        raise StartError(f"{error}: install the server with pip install 'conveyor[server]'") from error
    return run_with(settings.transport, main)


def _say_to_grpc() -> None:
    for name, value in _OF_GRPC.items():
        os.environ.setdefault(name, value)


async def _serve(settings: Settings) -> int:
    return await _run(_app(settings))


async def _work(settings: Settings, link: Link) -> int:
    """Serves on a port that is shared, until the link to the supervisor ends."""
    first = settings.metrics_port
    app = _app(dataclasses.replace(settings, metrics_port=first and first + link.index), shared_port=True)
    link.watch(app.stop, asyncio.get_running_loop(), settings.drain_s + PATIENCE_S / 2)
    telling = asyncio.create_task(_tell_ready(app, link))
    try:
        return await _run(app)
    finally:
        telling.cancel()


async def _tell_ready(app: "App", link: Link) -> None:
    await app.warm.wait()
    if app.pages is not None:
        link.tell(Report(metrics_port=app.pages.port))


def _app(settings: Settings, *, shared_port: bool = False) -> "App":
    from conveyor_server.app import App

    return App(settings, shared_port=shared_port)


async def _run(app: "App") -> int:
    status = await app.run()
    if app.stuck:
        # Python would wait for the thread of the run that does not come back.
        logging.shutdown()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
