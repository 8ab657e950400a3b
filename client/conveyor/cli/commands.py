"""The commands that talk to a server: models, sessions, step."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from conveyor_proto.v1 import spec_pb2
from google.protobuf import json_format

import conveyor
from conveyor._core.signature import Field
from conveyor._settings import Token
from conveyor.cli.table import duration, size, table


class UsageError(Exception):
    """The command line or its input cannot be understood; the message says what to give."""


def connected(arguments: argparse.Namespace) -> conveyor.Client:
    """A client as the common options say. A command does not wait long for a server that is not there."""
    tls = None
    try:
        if arguments.tls or arguments.ca or arguments.cert or arguments.key:
            tls = conveyor.TLS(
                root_certificates=arguments.ca,
                certificate=arguments.cert,
                private_key=arguments.key,
                server_name=arguments.server_name,
            )
        return conveyor.connect(
            arguments.target,
            tls=tls,
            token=token(arguments),
            metadata=[("x-tenant-id", arguments.tenant)] if arguments.tenant else [],
            timeout_s=arguments.timeout_s,
            connect_timeout_s=0.5,
            resume_timeout_s=arguments.timeout_s,
        )
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None


def token(arguments: argparse.Namespace) -> Token | None:
    """The bearer token to show. A file is read again whenever it is shown: it may be renewed meanwhile."""
    if not arguments.token_file:
        return os.environ.get("CONVEYOR_TOKEN") or None
    path = Path(arguments.token_file)
    # Here, so that a file that is not there is an error of the command line.
    path.read_bytes()
    return lambda: path.read_text().strip()


def models(arguments: argparse.Namespace) -> int:
    """`conveyor models`."""
    with connected(arguments) as client:
        found = client.models()
    if arguments.json:
        print_json([model_json(model) for model in found])
        return 0
    rows = [
        (
            model.name,
            model.version + (" (latest)" if model.latest else ""),
            model.status,
            model.device or "-",
            model.sessions,
            size(model.spec.state_bytes),
            _tensors(model.spec.inputs),
            _tensors(model.spec.outputs),
        )
        for model in found
    ]
    headings = ("MODEL", "VERSION", "STATUS", "DEVICE", "SESSIONS", "STATE", "INPUTS", "OUTPUTS")
    print(table(headings, rows, right=("SESSIONS", "STATE")) if rows else "no models")
    for model in found:
        if model.failure:
            print(f"{model.name} {model.version}: {model.failure}")
    if any(model.batch_policy for model in found):
        print("\n" + _policies(found))
    return 0


def _policies(found: Iterable[conveyor.Model]) -> str:
    """The bounds of each model's runs, those that settings or model gave marked, and what chose the others."""
    rows = []
    for model in found:
        if (policy := model.batch_policy) is None:
            continue
        bounds = {
            "max_batch": policy.max_batch,
            "quantum": policy.quantum,
            "max_batch_time_steps": policy.max_batch_time_steps,
            "inline_run_s": f"up to {policy.inline_rows}" if policy.inline_rows else "none",
        }
        marks = dict.fromkeys(policy.given, " (given)")
        if policy.max_batch == model.spec.max_rows:
            marks["max_batch"] = " (its most)"
        if policy.quantum == model.spec.max_time_steps_per_run:
            marks["quantum"] = " (its most)"
        marked = [f"{value}{marks.get(name, '')}" for name, value in bounds.items()]
        took = [f"{item.rows}: {duration(item.run_s)}" for item in policy.measured if item.time_steps == 1]
        rows.append((model.name, model.version, *marked, ", ".join(took)))
    headings = ("MODEL", "VERSION", "MAX BATCH", "QUANTUM", "TIME STEPS", "INLINE", "SESSIONS: ONE RUN")
    return table(headings, rows)


def sessions(arguments: argparse.Namespace) -> int:
    """`conveyor sessions`."""
    with connected(arguments) as client:
        found = list(client.sessions(arguments.model))
    if arguments.json:
        print_json([asdict(session) for session in found])
        return 0
    now = datetime.now(UTC)
    rows = [
        (
            session.id,
            session.model,
            session.version,
            session.applied_seq,
            "-" if _asleep(session) else session.applied_time_steps,
            session.durability,
            "-" if session.durability == "none" else session.durable_seq,
            "store" if _asleep(session) else "memory",
            "yes" if session.attached else "no",
            duration(max(0.0, (now - session.last_used_at).total_seconds())),
            duration(session.idle_timeout_s),
            "-" if _asleep(session) else size(session.state_bytes),
        )
        for session in found
    ]
    headings = (
        *("SESSION", "MODEL", "VERSION", "STEPS", "TIME STEPS", "DURABILITY", "STORED", "IN", "ATTACHED"),
        *("IDLE", "IDLE LIMIT", "STATE"),
    )
    right = ("STEPS", "TIME STEPS", "STORED", "IDLE", "IDLE LIMIT", "STATE")
    print(table(headings, rows, right=right) if rows else "no sessions")
    return 0


def _asleep(session: conveyor.SessionInfo) -> bool:
    """Its state is in the store alone, or in another server's memory, and what is not in the head is not known."""
    return session.durability != "none" and not session.resident


def migrate(arguments: argparse.Namespace) -> int:
    """`conveyor sessions migrate`."""
    with connected(arguments) as client:
        moved = client.migrate_sessions(arguments.name, source=arguments.from_version, target=arguments.to_version)
    if arguments.json:
        print_json({"model": arguments.name, "migrated_sessions": moved.sessions, "to_version": moved.version})
    else:
        sessions = "1 session moves" if moved.sessions == 1 else f"{moved.sessions} sessions move"
        print(f"{sessions} to {arguments.name} {moved.version}")
    return 0


def step(arguments: argparse.Namespace) -> int:
    """`conveyor step`."""
    show = _show_json if arguments.json else _show
    with connected(arguments) as client:
        kept = arguments.session is not None
        opened = client.session(
            arguments.model,
            version=arguments.version,
            session_id=arguments.session,
            resume="or-create" if kept else False,
            detach_on_exit=kept,
        )
        with opened as session:
            # One at a time: whoever types, or feeds answers back, gets each answer before giving the next input.
            for outputs in session.stream(_inputs(arguments), in_flight=1):
                show(session.applied_seq, outputs)
    return 0


def _inputs(arguments: argparse.Namespace) -> Iterator[Any]:
    if arguments.input is not None:
        yield _parsed(arguments.input, "--input")
    elif arguments.file is not None:
        yield _loaded(arguments.file)
    else:
        for number, line in enumerate(sys.stdin, 1):
            if line.strip():
                yield _parsed(line, f"line {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error}") from None


def _loaded(path: Path) -> Any:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as .npy or .npz: {error}") from None
    return loaded if isinstance(loaded, np.ndarray) else dict(loaded)


def _show(number: int, outputs: Any) -> None:
    named = outputs if isinstance(outputs, dict) else {"": outputs}
    for name, array in named.items():
        label = f"step {number}" + (f" {name}" if name else "")
        print(f"{label} {array.dtype} {list(array.shape)}", flush=True)
        text = np.array2string(array, precision=6, suppress_small=True, threshold=200, max_line_width=110)
        print("\n".join("  " + line for line in text.splitlines()), flush=True)


def _show_json(number: int, outputs: Any) -> None:
    named = outputs if isinstance(outputs, dict) else {"output": outputs}
    print(json.dumps({"step": number, **{name: array.tolist() for name, array in named.items()}}), flush=True)


def _tensors(specs: Iterable[spec_pb2.TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {Field.of(spec).describe(axes=['time'] if spec.has_time else [])}" for spec in specs)


def model_json(model: conveyor.Model) -> dict[str, Any]:
    """A model as JSON has it."""
    fields = {name: getattr(model, name) for name in model.__dataclass_fields__ if name != "spec"}
    policy = None if model.batch_policy is None else asdict(model.batch_policy)
    spec = json_format.MessageToDict(model.spec, preserving_proto_field_name=True)
    return fields | {"batch_policy": policy, "spec": spec}


def print_json(value: Any) -> None:
    """Prints a value for programs."""
    print(json.dumps(value, indent=2, default=datetime.isoformat))


Command = Callable[[argparse.Namespace], int]
