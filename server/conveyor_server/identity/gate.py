"""The gate before every call: who it is from, and whether they may.

Invariant: where there is an access file, nothing that changes or shows a session, a model or the server is done for a
caller who has not passed here. What is new in the file counts at once, and what is gone within a second; a file that
cannot be used any more does not, and the log says why, once.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from conveyor_proto.v1 import errors_pb2 as e

from conveyor_server.errors import Refused, StartError, refuse
from conveyor_server.identity.access import ANY_TENANT, Access, Entry, read_access, read_roles
from conveyor_server.identity.caller import ANYBODY, TENANT, Caller
from conveyor_server.identity.jwks import NotAccepted
from conveyor_server.identity.methods import ADMIN_METHODS, OPEN, ROLES
from conveyor_server.stamp import Stamp, stamp

TENANT_KEY = "x-tenant-id"
AUTHORIZATION_KEY = "authorization"
_FOREVER = float("inf")
# How often it is looked whether the files have changed.
_LOOK_S = 1.0
_MOST_TOKEN = 16 << 10
# JWTs whose signature was checked lately.
_REMEMBERED = 4096
_log = logging.getLogger("conveyor")


class Admitted(NamedTuple):
    """Somebody who may.

    Attributes:
        caller: who.
        until: unix seconds until which what they showed counts.
    """

    caller: Caller
    until: float = _FOREVER


class Gate:
    """Any thread.

    Args:
        path: the access file; None: nobody is asked who they are.
        admin: calls that change the server for everybody are answered.
        wall: unix seconds.
        clock: any seconds that do not go back.

    Attributes:
        generation: counts how often the files were read.

    Raises:
        StartError: the file cannot be used.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        admin: bool = True,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.admin = admin
        self.generation = 0
        self._wall, self._clock = wall, clock
        self._lock = threading.Lock()
        self._path = path
        self._access = None if path is None else read_access(path)
        self._stamp = self._look()
        self._looked_at = clock()
        self._known: OrderedDict[bytes, tuple[Entry, float]] = OrderedDict()

    @property
    def asks(self) -> bool:
        """Callers are asked who they are."""
        return self._path is not None

    @property
    def access(self) -> Access | None:
        """What the file says now; None: there is none."""
        access = self._access
        if access is None or self._clock() - self._looked_at < _LOOK_S:
            return access
        with self._lock:
            self._read_again()
            return self._access

    def admit(self, path: str, metadata: Mapping[str, str], names: Callable[[], Sequence[str]]) -> Admitted:
        """Who calls, if they may.

        Args:
            path: of the method, as `/conveyor.v1.SessionService/Step`.
            metadata: what the client sent ahead, by lower-case key.
            names: gives the names in its certificate, if it showed one that the server has checked.

        Raises:
            Refused: CALLER_UNKNOWN, ROLE_MISSING, NOT_OFFERED, or MESSAGE_INVALID for the tenant that it names.
        """
        if path in ADMIN_METHODS and not self.admin:
            raise refuse(
                e.ERROR_REASON_NOT_OFFERED,
                "calls that change what the server serves are off: start it with --admin on, "
                "or change it where it runs",
                feature="admin",
            )
        tenant = metadata.get(TENANT_KEY, "")
        if tenant and not TENANT.fullmatch(tenant):
            raise refuse(
                e.ERROR_REASON_MESSAGE_INVALID,
                f"{TENANT_KEY} is 1 to 64 letters, digits, '.', '_' or '-'",
                field=TENANT_KEY,
            )
        access = self.access
        if access is None:
            return Admitted(replace(ANYBODY, tenant=tenant) if tenant else ANYBODY)
        try:
            entry, until = self._entry(access, metadata.get(AUTHORIZATION_KEY, ""), names, path)
        except Refused:
            # A token that was made just now is in the file before it is shown.
            access = self._latest(access)
            entry, until = self._entry(access, metadata.get(AUTHORIZATION_KEY, ""), names, path)
        if entry.tenant not in {ANY_TENANT, tenant or entry.tenant}:
            raise refuse(
                e.ERROR_REASON_MESSAGE_INVALID,
                f"whoever calls acts for one tenant, and {TENANT_KEY} names another: leave it out",
                field=TENANT_KEY,
            )
        roles = ROLES.get(path, frozenset())
        if path not in OPEN and not entry.roles & roles:
            may = ", ".join(sorted(roles)) or "none"
            has = ", ".join(sorted(entry.roles))
            raise refuse(
                e.ERROR_REASON_ROLE_MISSING,
                f"{path.rpartition('/')[2]} needs one of the roles {may}, and whoever calls has {has}: ask for it "
                "where the server's access file is kept",
                roles=may,
            )
        return Admitted(access.caller(entry, tenant), until)

    # ------------------------------------------------------------ within

    def _entry(
        self, access: Access, authorization: str, names: Callable[[], Sequence[str]], path: str
    ) -> tuple[Entry, float]:
        """Who shows that, and until when it counts."""
        if authorization:
            return self._bearer(access, authorization)
        for name in names() if access.certificates else ():
            if name in access.certificates:
                return access.certificates[name], _FOREVER
        if access.anonymous is not None:
            return access.anonymous, _FOREVER
        if path in OPEN:
            return _NOBODY, _FOREVER
        raise _unknown("the call shows no token: send `authorization: Bearer TOKEN`, or a client certificate it knows")

    def _bearer(self, access: Access, authorization: str) -> tuple[Entry, float]:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > _MOST_TOKEN:
            raise _unknown("`authorization` is `Bearer TOKEN`")
        digest = hashlib.sha256(token.encode())
        entry = access.tokens.get(digest.hexdigest())
        if entry is not None:
            return entry, _FOREVER
        # A JWT has three parts; any other is a static token that is not in the file.
        if access.issuer is None or token.count(".") != 2:
            raise _unknown("the token is not one that this server knows: ask for one where its access file is kept")
        with self._lock:
            known = self._known.get(digest.digest())
        if known is not None and known[1] > self._wall():
            return known
        try:
            claims = access.issuer.read(token)
            entry = Entry(claims.subject, claims.tenant, read_roles(claims.roles, "the token"))
        except (NotAccepted, StartError) as why:
            raise _unknown(str(why)) from None
        # Whoever may act for any tenant is in the access file, not made elsewhere.
        if not TENANT.fullmatch(entry.tenant):
            raise _unknown("the token's tenant is no name of one: 1 to 64 letters, digits, '.', '_' or '-'")
        with self._lock:
            # Of the keys that were read since, it knows nothing.
            if self._access is access:
                self._known[digest.digest()] = entry, claims.until
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
        return entry, claims.until

    def _latest(self, known: Access) -> Access:
        """What the files say at this moment."""
        with self._lock:
            self._read_again()
            return self._access or known

    def _read_again(self) -> None:
        """Under the lock."""
        self._looked_at = self._clock()
        found = self._look()
        if self._path is None or found == self._stamp:
            return
        # Also where it is of no use: it is said once.
        self._stamp = found
        try:
            self._access = read_access(self._path)
        except StartError as error:
            _log.error("the access file as it was before goes on: %s", error)
            return
        self._stamp = self._look()
        self._known.clear()
        self.generation += 1
        _log.info("the access file was read again; who may call: %s", self._access.describe())

    def _look(self) -> list[Stamp]:
        return [stamp(path) for path in (self._access.files if self._access is not None else ())]


_NOBODY = Entry("", ANY_TENANT, frozenset())


def _unknown(why: str) -> Refused:
    return refuse(e.ERROR_REASON_CALLER_UNKNOWN, why)
