"""Which JWTs count, and which do not, whoever made them."""

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conveyor_server.identity.jwks import Issuer, NotAccepted
from issuer import AUDIENCE, ISSUER, Signer


def issuer(path: Path, **given: Any) -> Issuer:
    return Issuer(path, name=ISSUER, audience=AUDIENCE, **given)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_token_that_counts(tmp_path: Path, algorithm: str) -> None:
    signer, path = Signer("k", algorithm), tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [signer.public(), Signer("other").public()]}))
    until = time.time() + 60
    claims = issuer(path).read(signer.token(exp=until, roles="infer  observe", tenant="t", sub="me"))
    assert (claims.subject, claims.tenant, claims.roles) == ("me", "t", ["infer", "observe"])
    assert claims.until == pytest.approx(until, abs=1)


def test_claims_of_other_names_and_clocks_that_are_apart(jwks: Path, signer: Signer) -> None:
    names = issuer(jwks, tenant_claim="org", roles_claim="scope", leeway_s=30)
    ended = time.time() - 10
    claims = names.read(signer.token(org="o", scope="admin", exp=ended))
    assert (claims.tenant, claims.roles) == ("o", ["admin"])
    assert claims.until == pytest.approx(ended + 30, abs=1)
    with pytest.raises(NotAccepted, match="expired"):
        issuer(jwks).read(signer.token(exp=ended))


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"exp": time.time() - 1}, "expired"),
        ({"aud": "another"}, "audience"),
        ({"aud": ["x", "y"]}, "audience"),
        ({"iss": "https://evil.example"}, "issuer"),
        ({"without": "exp"}, "nothing of exp"),
        ({"without": "aud"}, "aud"),
        ({"without": "iss"}, "iss"),
        ({"nbf": time.time() + 3600}, "not valid yet"),
        ({"without": "tenant"}, "no tenant"),
        ({"tenant": 7}, "no tenant"),
        ({"without": "roles"}, "no roles"),
        ({"roles": [1]}, "no roles"),
        ({"roles": {"infer": True}}, "no roles"),
        ({"kid": "unknown"}, "kid"),
    ],
)
def test_tokens_that_do_not_count(jwks: Path, signer: Signer, claims: dict[str, Any], why: str) -> None:
    token = signer.token(**claims)
    with pytest.raises(NotAccepted, match=why) as caught:
        issuer(jwks).read(token)
    assert token not in str(caught.value)


def test_a_token_without_a_key_id_counts_where_there_is_one_key(tmp_path: Path, jwks: Path, signer: Signer) -> None:
    token = signer.token(kid=None)
    assert issuer(jwks).read(token).tenant == "acme"
    several = tmp_path / "several.json"
    several.write_text(json.dumps({"keys": [signer.public(), Signer("k2").public()]}))
    with pytest.raises(NotAccepted, match="kid"):
        issuer(several).read(token)


def test_forgeries(jwks: Path, signer: Signer, forge: Callable[..., str]) -> None:
    """What whoever has the public key can make."""
    claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 60, "tenant": "acme", "roles": ["admin"]}
    good = signer.token()
    head, body, signature = good.split(".")
    other = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    unsigned = base64.urlsafe_b64encode(json.dumps({"alg": "none", "kid": "k1"}).encode()).rstrip(b"=").decode()
    forged = [
        forge(claims, Signer("k1").private, "ES256", kid="k1"),
        # The public key as the secret of an HMAC, by hand: PyJWT itself would not sign with it.
        hmac_with(signer.pem(), claims),
        f"{head}.{other}.{signature}",
        f"{unsigned}.{other}.",
        f"{head}.{body}.",
        f"{head}.{body}",
        f"{base64.urlsafe_b64encode(b'[' * 8000).decode()}.{body}.{signature}",
        f"{base64.urlsafe_b64encode(b'[1]').decode()}.{body}.{signature}",
        "..",
        "a.b.c",
        good[:-4],
    ]
    for token in forged:
        with pytest.raises(NotAccepted):
            issuer(jwks).read(token)
    assert issuer(jwks).read(good).roles == ["infer"]


def hmac_with(secret: bytes, claims: dict[str, Any]) -> str:
    import hashlib
    import hmac

    def encoded(content: bytes) -> str:
        return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

    text = encoded(json.dumps({"alg": "HS256", "kid": "k1"}).encode()) + "." + encoded(json.dumps(claims).encode())
    return text + "." + encoded(hmac.new(secret, text.encode(), hashlib.sha256).digest())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "no JWKS file"),
        ("[]", "no JWKS file"),
        ('{"keys": {}}', "no JWKS file"),
        ('{"keys": []}', "no public key"),
        ('{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', "no public key"),
        ('{"keys": [{"kty": "RSA", "n": "x"}]}', "cannot be used"),
        ("[" * 100_000, "no JWKS file"),
        ("private", "private key"),
        ("large", "at most 1 MiB"),
    ],
)
def test_files_that_are_none(tmp_path: Path, signer: Signer, content: str, why: str) -> None:
    path = tmp_path / "jwks.json"
    if content == "private":
        content = json.dumps({"keys": [signer.secret()]})
    elif content == "large":
        content = json.dumps({"keys": [signer.public()], "x": "x" * (1 << 20)})
    path.write_text(content)
    with pytest.raises(ValueError, match=why):
        issuer(path)


def test_algorithms_that_whoever_has_the_public_key_could_use_are_refused(jwks: Path) -> None:
    for algorithm in ("HS256", "none", ""):
        with pytest.raises(ValueError, match="is not one of"):
            issuer(jwks, algorithms=[algorithm])
    with pytest.raises(ValueError, match="cannot read"):
        issuer(jwks.with_name("missing.json"))


def test_only_the_algorithms_that_were_chosen(jwks: Path, signer: Signer) -> None:
    with pytest.raises(NotAccepted):
        issuer(jwks, algorithms=["RS256"]).read(signer.token())
