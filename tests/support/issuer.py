"""Whoever signs JWTs: keys of each kind, and tokens by them."""

import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

ISSUER, AUDIENCE = "https://id.example", "conveyor"
_MAKE = {
    "RS256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}
_JWK = {
    "RS256": jwt.algorithms.RSAAlgorithm,
    "ES256": jwt.algorithms.ECAlgorithm,
    "EdDSA": jwt.algorithms.OKPAlgorithm,
}


class Signer:
    """One key, named `kid`."""

    def __init__(self, kid: str, algorithm: str = "ES256") -> None:
        self.kid, self.algorithm = kid, algorithm
        self.private = _MAKE[algorithm]()

    def public(self) -> dict[str, Any]:
        """Its public half as a JWK."""
        return {**json.loads(_JWK[self.algorithm].to_jwk(self.private.public_key())), "kid": self.kid, "use": "sig"}

    def secret(self) -> dict[str, Any]:
        """The whole key as a JWK, which a server is never to be given."""
        return {**json.loads(_JWK[self.algorithm].to_jwk(self.private)), "kid": self.kid, "use": "sig"}

    def pem(self) -> bytes:
        """Its public half as everybody may have it."""
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def token(self, *, kid: str | None = "", without: str = "", **claims: Any) -> str:
        """A token that is good for an hour, unless `claims` say otherwise."""
        content = {
            **{"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 3600, "sub": "somebody"},
            **{"tenant": "acme", "roles": ["infer"]},
            **claims,
        }
        content.pop(without, None)
        headers = {} if kid is None else {"kid": kid or self.kid}
        return jwt.encode(content, self.private, algorithm=self.algorithm, headers=headers)
