"""All the real parts of a run: Valkey, replicas, Envoy before them, and links between that can be cut.

    clients -> link -> Envoy -> replicas -> a link each -> Valkey

Invariant: whatever was started is ended when the rig is left, however it is left.
"""

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from tests.fault.envoy import Envoy
from tests.fault.model import write_model
from tests.fault.proxy import FaultProxy
from tests.fault.replica import Replica
from tests.fault.valkey_server import ValkeyServer

REPLICAS = 3
# Of the defaults, what makes things happen in seconds rather than minutes.
_FLAGS = ("--checkpoint-ms", "100", "--passivate-after-s", "2", "--durability", "auto")


class Rig:
    """Everything, started by `with`.

    Args:
        folder: its own.
        replicas: how many.
        durable: they have a store. False: there is no Valkey either.

    Attributes:
        model: the file of the model.
        valkey: the store; None where there is none.
        replicas: the servers.
        to_envoy: links that clients use: by session, and round robin.
        to_store: a link for each replica.
        store_turn: held by whoever has the store killed.
    """

    def __init__(self, folder: Path, *, replicas: int = REPLICAS, durable: bool = True) -> None:
        self.folder = folder
        self.durable = durable
        self.model = write_model(folder / "models")
        self.valkey = ValkeyServer(folder / "valkey") if durable else None
        self.replicas = [Replica(f"r{number}", folder / "models", folder) for number in range(replicas)]
        self.envoy = Envoy(folder / "envoy", [replica.port for replica in self.replicas])
        self._proxy = FaultProxy()
        self._stack = contextlib.ExitStack()
        self.store_turn = threading.Lock()
        self._turn = threading.Condition()
        self._down: set[Replica] = set()

    def __enter__(self) -> Self:
        """Starts all; the replicas serve when this returns."""
        with self._stack:
            self._stack.enter_context(self._proxy)
            for process in (*self.replicas, self.envoy, *([self.valkey] if self.valkey else [])):
                self._stack.callback(process.kill)
            if self.valkey is not None:
                self.valkey.start()
            self.by_session = self._proxy.link("clients", self.envoy.by_session)
            self.round_robin = self._proxy.link("clients, round robin", self.envoy.round_robin)
            self.to_envoy = [self.by_session, self.round_robin]
            port = self.valkey.port if self.valkey else 0
            self.to_store = [self._proxy.link(f"store of {replica.name}", port) for replica in self.replicas if port]
            self.envoy.start()
            self.restart()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends all."""
        self._stack.close()

    def restart(self, *, mutant: str = "", flags: Sequence[str] = ()) -> None:
        """Kills all replicas and starts them again, with that mutation or none.

        Args:
            mutant: a name of tests.fault.mutants; "": none.
            flags: of `conveyor serve`, over the rig's own.
        """
        for replica in self.replicas:
            replica.kill()
        for index, replica in enumerate(self.replicas):
            replica.become([*self._store_flags(index), *flags], mutant=mutant)
            replica.start()
        for replica in self.replicas:
            replica.wait_ready()
        self.envoy.wait_healthy()

    @contextlib.contextmanager
    def down(self, candidates: Sequence[Replica], chance: random.Random) -> Iterator[Replica]:
        """Chooses a replica that nobody else strikes now; waits while no more than one would be left."""
        most = max(1, len(self.replicas) - 1)
        with self._turn:
            self._turn.wait_for(lambda: len(self._down) < most and any(item not in self._down for item in candidates))
            replica = chance.choice([item for item in candidates if item not in self._down])
            self._down.add(replica)
        try:
            yield replica
        finally:
            with self._turn:
                self._down.discard(replica)
                self._turn.notify_all()

    def heal(self) -> None:
        """Ends what a fault left: links flow, and everybody runs."""
        for link in (*self.to_envoy, *self.to_store):
            link.slow(0.0)
            link.flow()
        if self.valkey is not None and not self.valkey.running:
            self.valkey.start()
        for replica in self.replicas:
            if replica.running:
                replica.thaw()
            else:
                replica.start()
            replica.wait_ready()
        self.envoy.wait_healthy()

    def tails(self) -> str:
        """The ends of all logs, for whoever has to find out."""
        processes = (*self.replicas, self.envoy, *([self.valkey] if self.valkey else []))
        return "\n".join(f"---- {process.log.name}\n{process.tail(1500)}" for process in processes)

    def _store_flags(self, index: int) -> list[str]:
        if not self.durable:
            return []
        url = f"valkey://127.0.0.1:{self.to_store[index].port}/0"
        return ["--store", url, "--replica", f"r{index}", *_FLAGS]
