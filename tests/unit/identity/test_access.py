"""What an access file can say, and what is said of one that cannot be meant."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conveyor_server.errors import StartError
from conveyor_server.identity.access import read_access
from conveyor_server.identity.caller import Role

A, B = "a" * 64, "b" * 64
WHOLE = f"""
[[tokens]]
name = "gateway"
sha256 = "{A.upper()}"
tenant = "acme"
roles = ["infer"]

[[tokens]]
name = "operator"
sha256 = "{B}"
tenant = "*"
roles = ["admin", "observe"]

[[certificates]]
name = "device.example"
tenant = "field"
roles = ["infer"]

[jwt]
jwks = "jwks.json"
issuer = "https://id.example"
audience = "conveyor"
leeway_s = 5

[anonymous]
tenant = "public"
roles = ["observe"]

[tenants.acme]
models = ["keywords", "vad*"]
max_sessions = 7
"""


def test_a_file_that_says_all_there_is_to_say(write: Callable[[str], Path], jwks: Path) -> None:
    access = read_access(write(WHOLE))
    assert access.files == (write(WHOLE), jwks)
    gateway = access.caller(access.tokens[A], "")
    assert (gateway.name, gateway.tenant, gateway.roles) == ("gateway", "acme", {Role.INFER})
    assert [gateway.uses(name) for name in ("keywords", "vad2", "charlm", "keywords2")] == [True, True, False, False]
    assert gateway.max_sessions == 7
    operator = access.caller(access.tokens[B], "acme")
    assert (operator.tenant, operator.max_sessions, operator.uses("charlm")) == ("acme", 7, False)
    assert access.caller(access.tokens[B], "").uses("charlm")
    assert access.caller(access.certificates["device.example"], "").tenant == "field"
    assert access.describe() == (
        "2 tokens, 1 certificate, JWTs of https://id.example; without any of them, anybody as observe"
    )


def test_a_file_that_says_nothing_lets_nobody_in(write: Callable[[str], Path]) -> None:
    assert read_access(write("")).describe() == "nobody; without any of them, nobody"


TOKEN = f'name = "x"\nsha256 = "{A}"\ntenant = "t"\nroles = ["infer"]\n'


JWT = '[jwt]\njwks = "jwks.json"\nissuer = "i"\naudience = "a"\n'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x", "not TOML"),
        ("x = " + "[" * 5000, "not TOML"),
        ("token = 1", "'token' means nothing: did you mean tokens?"),
        ("[tokens]", r"write each of the tokens as \[\[tokens\]\]"),
        ("tokens = [1]", r"write each of the tokens as \[\[tokens\]\]"),
        ("[[tokens]]\n" + TOKEN + "role = 1", "token 1: 'role' means nothing: did you mean roles?"),
        ("[[tokens]]\n" + TOKEN.replace(A, "a secret"), "token 1: sha256 is 64 hexadecimal digits"),
        (f"[[tokens]]\n{TOKEN}[[tokens]]\n{TOKEN}", "token 2 has the same sha256"),
        ("[[tokens]]\n" + TOKEN.replace('"infer"', '"infers"'), "'infers' is no role; there are infer, observe, admin"),
        ("[[tokens]]\n" + TOKEN.replace('["infer"]', "[]"), "roles is a list of one or more texts"),
        ("[[tokens]]\n" + TOKEN.replace('["infer"]', '"infer"'), "roles is a list of one or more texts"),
        ("[[tokens]]\n" + TOKEN.replace('"t"', '"a/b"'), "tenant is 1 to 64 letters"),
        ("[[tokens]]\n" + TOKEN.replace('tenant = "t"\n', ""), "tenant is needed"),
        ("[[tokens]]\n" + TOKEN.replace('name = "x"\n', ""), "name is needed"),
        ('[[certificates]]\nname = "c"\ntenant = "t"\nroles = ["infer"]\n' * 2, "certificate 2: 'c' is there already"),
        ('[anonymous]\nroles = ["observe"]', "anonymous: tenant is needed"),
        ("anonymous = 1", "anonymous is a table"),
        ('[tenants."a b"]', "a tenant's name is"),
        ("[tenants]\na = 1", "tenant a is a table"),
        ("[tenants.a]\nmax_sessions = -1", "max_sessions is a whole number"),
        ("[tenants.a]\nmax_sessions = true", "max_sessions is a whole number"),
        ("[tenants.a]\nmodels = []", "models is a list"),
        ("[tenants.a]\nmodel = []", "did you mean models?"),
        ('[jwt]\nissuer = "i"\naudience = "a"', "jwks is needed"),
        ('[jwt]\njwks = "missing.json"\nissuer = "i"\naudience = "a"', "cannot read the JWKS file"),
        (JWT + "leeway_s = -1", "leeway_s is a number of seconds"),
        (JWT + 'algorithms = ["HS256"]', "'HS256' is not one of"),
        (JWT + "tenant_claim = 1", "tenant_claim is needed, as text"),
        ("#" * (4 << 20) + "\n", "it is no access file"),
    ],
)
def test_what_cannot_be_meant(write: Callable[[str], Path], jwks: Path, text: str, why: str) -> None:
    with pytest.raises(StartError, match=why) as caught:
        read_access(write(text))
    assert "access.toml" in str(caught.value)
    assert "a secret" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot read the access file"):
        read_access(tmp_path / "no.toml")
