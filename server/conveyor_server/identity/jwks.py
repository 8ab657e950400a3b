"""JWTs of one issuer, by a file of its public keys (RFC 7517, RFC 7519).

Invariant: a token counts only with a signature by one of the keys, of an algorithm with a public key, from this issuer,
for this audience, and with an end that has not come; PyJWT checks all of it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jwt

_MOST_BYTES = 1 << 20
# Whoever has a public key must not be able to sign: no HMAC, and no `none`.
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_SPACES = re.compile(r"\s+")


class NotAccepted(Exception):  # noqa: N818 - it says what happened
    """The token does not count; the message says why, and holds nothing of it."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token says.

    Attributes:
        subject: `sub`; "": it names none.
        tenant: whom its bearer acts for.
        roles: as it names them.
        until: unix seconds of its end.
    """

    subject: str
    tenant: str
    roles: Sequence[str]
    until: float


class Issuer:
    """Whose tokens are accepted. Any thread.

    Args:
        path: JWKS file of the issuer's public keys.
        name: `iss` of its tokens.
        audience: `aud` of those that are for this server.
        algorithms: of the signature.
        tenant_claim: what holds the tenant's name.
        roles_claim: what holds the roles: a list, or text with spaces between.
        leeway_s: how far the clocks of issuer and server may be apart.

    Raises:
        ValueError: the file or the algorithms cannot be used; the message says why.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        audience: str,
        algorithms: Sequence[str] = _ALGORITHMS,
        tenant_claim: str = "tenant",
        roles_claim: str = "roles",
        leeway_s: float = 0.0,
    ) -> None:
        self.path = path
        self.name = name
        self._audience = audience
        for algorithm in algorithms:
            if algorithm not in _ALGORITHMS:
                raise ValueError(f"algorithm {algorithm!r} is not one of {', '.join(_ALGORITHMS)}")
        self._algorithms = list(algorithms)
        self._tenant_claim, self._roles_claim = tenant_claim, roles_claim
        self._leeway_s = leeway_s
        self._keys = _keys(path)

    def read(self, token: str) -> Claims:
        """What a token says that counts.

        Raises:
            NotAccepted: it does not.
        """
        import jwt

        try:
            content = jwt.decode(
                token,
                self._key(jwt.get_unverified_header(token)),
                algorithms=self._algorithms,
                audience=self._audience,
                issuer=self.name,
                leeway=self._leeway_s,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError:
            raise NotAccepted("the token has expired: get a new one") from None
        except jwt.InvalidAudienceError:
            raise NotAccepted("the token is for another audience") from None
        except jwt.InvalidIssuerError:
            raise NotAccepted("the token is from another issuer") from None
        except jwt.MissingRequiredClaimError as error:
            raise NotAccepted(f"the token says nothing of {error.claim}") from None
        except (jwt.PyJWTError, RecursionError):
            # What else there is to say helps only who forges.
            raise NotAccepted(
                "the token is not one that this server's issuer has signed, or is not valid yet"
            ) from None
        return Claims(
            subject=str(content.get("sub", "")),
            tenant=self._tenant(content),
            roles=self._roles(content),
            until=float(content["exp"]) + self._leeway_s,
        )

    def _key(self, header: Mapping[str, Any]) -> "jwt.PyJWK":
        name = header.get("kid")
        key = self._keys.get(name) if isinstance(name, str) else None
        if key is None and name is None and len(self._keys) == 1:
            key = next(iter(self._keys.values()))
        if key is None:
            raise NotAccepted("the token was signed with a key (kid) that is not in the server's JWKS file")
        return key

    def _tenant(self, content: Mapping[str, Any]) -> str:
        tenant = content.get(self._tenant_claim)
        if not isinstance(tenant, str):
            raise NotAccepted(f"the token names no tenant, in claim {self._tenant_claim!r}")
        return tenant

    def _roles(self, content: Mapping[str, Any]) -> list[str]:
        roles = content.get(self._roles_claim)
        if isinstance(roles, str):
            roles = [role for role in _SPACES.split(roles) if role]
        if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
            raise NotAccepted(f"the token names no roles, in claim {self._roles_claim!r}")
        return roles


def _keys(path: Path) -> dict[str, "jwt.PyJWK"]:
    """Public keys, by their ids."""
    try:
        import jwt
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: JWTs need pip install 'conveyor[server,jwt]'") from None
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        content = json.loads(data)
        listed = content["keys"]
    except OSError as error:
        raise ValueError(f"cannot read the JWKS file {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        listed = None
    if not isinstance(listed, list) or len(data) > _MOST_BYTES:
        raise ValueError(f"{path} is no JWKS file: a JSON object with a list of keys, at most 1 MiB")
    keys = {}
    for number, item in enumerate(listed):
        # What signs nothing here may be in the same file.
        if not isinstance(item, dict) or item.get("use", "sig") != "sig" or item.get("kty") == "oct":
            continue
        if "d" in item:
            raise ValueError(f"{path} holds a private key: give the server the public ones alone")
        try:
            keys[str(item.get("kid", number))] = jwt.PyJWK(item)
        except jwt.PyJWTError:
            raise ValueError(f"key {number + 1} of {path} cannot be used") from None
    if not keys:
        raise ValueError(f"{path} holds no public key that could have signed a token")
    return keys
