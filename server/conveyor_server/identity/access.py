"""The access file: whom the server knows, by what they show, and what each tenant may use.

Invariant: what the file does not say is not granted; a key that means nothing is an error that says which was probably
meant. A token itself is never in it, only its SHA-256.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conveyor_server.errors import StartError
from conveyor_server.identity.caller import TENANT, Caller, Role
from conveyor_server.identity.jwks import Issuer

# Acts for any tenant, or for none.
ANY_TENANT = "*"
_MOST_BYTES = 4 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SOME_ROLES = ", ".join(Role)


@dataclass(frozen=True, slots=True)
class Tenant:
    """What a tenant may use; see Caller."""

    models: Sequence[str] = ("*",)
    max_sessions: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """Somebody whom the server knows.

    Attributes:
        name: for people.
        tenant: whom they act for; ANY_TENANT: any.
        roles: what they may do.
    """

    name: str
    tenant: str
    roles: frozenset[Role]


@dataclass(frozen=True, slots=True)
class Access:
    """What an access file says.

    Attributes:
        tokens: by the SHA-256 of the token, in hexadecimal.
        certificates: by a name in the client's certificate.
        issuer: whose JWTs are accepted; None: nobody's.
        anonymous: who shows nothing; None: they are refused.
        tenants: by name; a tenant that is not there has Tenant's defaults.
        files: what was read.
    """

    tokens: Mapping[str, Entry] = field(default_factory=dict)
    certificates: Mapping[str, Entry] = field(default_factory=dict)
    issuer: Issuer | None = None
    anonymous: Entry | None = None
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    files: Sequence[Path] = ()

    def caller(self, entry: Entry, named: str) -> Caller:
        """Somebody who calls for a tenant.

        Args:
            entry: who.
            named: the tenant that they name, who may be for any; "": none.
        """
        tenant = named if entry.tenant == ANY_TENANT else entry.tenant
        limits = self.tenants.get(tenant, Tenant())
        return Caller(entry.name, entry.roles, tenant, limits.models, limits.max_sessions)

    def describe(self) -> str:
        """What callers are asked for, for people."""
        asked = [_counted(len(self.tokens), "token"), _counted(len(self.certificates), "certificate")]
        if self.issuer is not None:
            asked.append(f"JWTs of {self.issuer.name}")
        known = ", ".join(filter(None, asked)) or "nobody"
        if self.anonymous is None:
            return f"{known}; without any of them, nobody"
        return f"{known}; without any of them, anybody as {', '.join(sorted(self.anonymous.roles))}"


def read_access(path: Path) -> Access:
    """What the file says.

    Raises:
        StartError: it cannot be read, or is none; the message says what is wrong with it.
    """
    content = _load(path)
    known = {"tokens", "certificates", "jwt", "anonymous", "tenants"}
    _check_keys(content, known, f"{path}")
    tokens = {}
    for number, given in enumerate(_tables(content, "tokens", path), 1):
        where = f"{path}, token {number}"
        _check_keys(given, {"name", "sha256", "tenant", "roles"}, where)
        digest = _text(given, "sha256", where).lower()
        if not _DIGEST.fullmatch(digest):
            raise StartError(
                f"{where}: sha256 is 64 hexadecimal digits; `conveyor token new` makes a token and says its own"
            )
        if digest in tokens:
            raise StartError(f"{where} has the same sha256 as another: give each its own token")
        tokens[digest] = _entry(given, where)
    certificates = {}
    for number, given in enumerate(_tables(content, "certificates", path), 1):
        where = f"{path}, certificate {number}"
        _check_keys(given, {"name", "tenant", "roles"}, where)
        entry = _entry(given, where)
        if entry.name in certificates:
            raise StartError(f"{where}: {entry.name!r} is there already")
        certificates[entry.name] = entry
    anonymous = None
    if "anonymous" in content:
        where = f"{path}, anonymous"
        given = _table(content["anonymous"], where)
        _check_keys(given, {"tenant", "roles"}, where)
        anonymous = _entry({"name": "anonymous", **given}, where)
    issuer = _issuer(content, path)
    return Access(
        tokens,
        certificates,
        issuer,
        anonymous,
        _tenants(content, path),
        (path,) if issuer is None else (path, issuer.path),
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise StartError(f"{path} has more than {_MOST_BYTES} bytes: it is no access file")
        return tomllib.loads(data.decode())
    except OSError as error:
        raise StartError(f"cannot read the access file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StartError(f"the access file {path} is not TOML: {error}") from error


def _issuer(content: Mapping[str, Any], path: Path) -> Issuer | None:
    if "jwt" not in content:
        return None
    where = f"{path}, jwt"
    given = dict(_table(content["jwt"], where))
    optional = {"algorithms", "tenant_claim", "roles_claim", "leeway_s"}
    _check_keys(given, {"jwks", "issuer", "audience", *optional}, where)
    for name in ("jwks", "issuer", "audience"):
        _text(given, name, where)
    for name in ("tenant_claim", "roles_claim"):
        if name in given:
            _text(given, name, where)
    leeway_s = given.get("leeway_s", 0)
    if isinstance(leeway_s, bool) or not isinstance(leeway_s, int | float) or not 0 <= leeway_s <= 3600:
        raise StartError(f"{where}: leeway_s is a number of seconds from 0 to 3600")
    if "algorithms" in given:
        given["algorithms"] = _texts(given, "algorithms", where)
    try:
        # Beside the access file, unless its path is whole.
        return Issuer(path.parent / given.pop("jwks"), name=given.pop("issuer"), **given)
    except ValueError as error:
        raise StartError(f"{where}: {error}") from error


def _tenants(content: Mapping[str, Any], path: Path) -> dict[str, Tenant]:
    tenants = {}
    for name, given in _table(content.get("tenants", {}), f"{path}, tenants").items():
        where = f"{path}, tenant {name}"
        if not TENANT.fullmatch(name):
            raise StartError(f"{where}: a tenant's name is 1 to 64 letters, digits, '.', '_' or '-'")
        table = _table(given, where)
        _check_keys(table, {"models", "max_sessions"}, where)
        most = table.get("max_sessions", 0)
        if isinstance(most, bool) or not isinstance(most, int) or most < 0:
            raise StartError(f"{where}: max_sessions is a whole number; 0: the server's setting")
        tenants[name] = Tenant(tuple(_texts(table, "models", where)) if "models" in table else ("*",), most)
    return tenants


def _entry(given: Mapping[str, Any], where: str) -> Entry:
    tenant = _text(given, "tenant", where)
    if tenant != ANY_TENANT and not TENANT.fullmatch(tenant):
        raise StartError(
            f"{where}: tenant is 1 to 64 letters, digits, '.', '_' or '-'; or '*', for whoever may act for any tenant"
        )
    return Entry(_text(given, "name", where), tenant, read_roles(_texts(given, "roles", where), where))


def read_roles(names: Sequence[str], where: str) -> frozenset[Role]:
    """The roles of these names.

    Raises:
        StartError: one is none.
    """
    roles = set()
    for name in names:
        if name not in {*Role}:
            raise StartError(f"{where}: {name!r} is no role; there are {_SOME_ROLES}")
        roles.add(Role(name))
    return frozenset(roles)


def _table(given: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise StartError(f"{where} is a table")
    return given


def _tables(content: Mapping[str, Any], name: str, path: Path) -> Sequence[Mapping[str, Any]]:
    given = content.get(name, [])
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise StartError(f"{path}: write each of the {name} as [[{name}]]")
    return given


def _text(given: Mapping[str, Any], name: str, where: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value:
        raise StartError(f"{where}: {name} is needed, as text")
    return value


def _texts(given: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = given.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise StartError(f"{where}: {name} is a list of one or more texts")
    return value


def _check_keys(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            meant = f": did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"
            raise StartError(f"{where}: {name!r} means nothing{meant}")


def _counted(count: int, noun: str) -> str:
    return "" if not count else f"{count} {noun}{'' if count == 1 else 's'}"
