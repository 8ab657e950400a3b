"""Who is let in, as what, and how soon a change of the files counts."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from conveyor_proto.inference import service_pb2
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import model_pb2, session_pb2
from conveyor_server.errors import Refused, StartError
from conveyor_server.identity.caller import ANYBODY, Role, bounds, full_name, prefix, public_name
from conveyor_server.identity.gate import Gate
from conveyor_server.identity.methods import ADMIN_METHODS, METRICS, OPEN, ROLES
from issuer import Signer

STEP = "/conveyor.v1.SessionService/Step"
LOAD = "/conveyor.v1.ModelService/LoadModel"
JWT = '[jwt]\njwks = "jwks.json"\nissuer = "https://id.example"\naudience = "conveyor"\n'


def token(name: str, tenant: str, *roles: str) -> str:
    digest = hashlib.sha256(f"token of {name}".encode()).hexdigest()
    return f'[[tokens]]\nname = "{name}"\nsha256 = "{digest}"\ntenant = "{tenant}"\nroles = {json.dumps(roles)}\n'


def bearer(text: str, tenant: str = "") -> dict[str, str]:
    return {"authorization": f"Bearer {text}", **({"x-tenant-id": tenant} if tenant else {})}


def reason(gate: Gate, path: str, metadata: Mapping[str, str], names: tuple[str, ...] = ()) -> str:
    """Why somebody is not let in."""
    with pytest.raises(Refused) as caught:
        gate.admit(path, metadata, lambda: names)
    assert caught.value.fault.message
    return e.ErrorReason.Name(caught.value.fault.reason).removeprefix("ERROR_REASON_")


class Clock:
    """Seconds that pass when it is said."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_method_of_every_service_has_roles() -> None:
    services = [
        session_pb2.DESCRIPTOR.services_by_name["SessionService"],
        model_pb2.DESCRIPTOR.services_by_name["ModelService"],
        service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    ]
    paths = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert paths == {*ROLES, *OPEN} - {METRICS}
    assert all(ROLES.values())
    assert {LOAD, "/inference.GRPCInferenceService/RepositoryModelUnload"} <= ADMIN_METHODS


def test_without_a_file_anybody_may_and_a_tenant_is_believed() -> None:
    gate = Gate()
    assert not gate.asks
    assert gate.admit(LOAD, {}, list).caller == ANYBODY
    acme = gate.admit(STEP, {"x-tenant-id": "acme", "authorization": "nonsense"}, list).caller
    assert (acme.tenant, acme.roles) == ("acme", frozenset(Role))
    assert reason(gate, STEP, {"x-tenant-id": "a/b"}) == "MESSAGE_INVALID"


def test_admin_that_is_off_is_off_for_everybody(write: Callable[[str], Path]) -> None:
    assert reason(Gate(admin=False), LOAD, {}) == "NOT_OFFERED"
    gate = Gate(write(token("op", "*", "admin")), admin=False)
    assert reason(gate, LOAD, bearer("token of op")) == "NOT_OFFERED"


def test_roles_are_what_a_token_may_do(write: Callable[[str], Path]) -> None:
    gate = Gate(write(token("in", "acme", "infer") + token("op", "*", "admin") + token("see", "acme", "observe")))
    assert gate.admit(STEP, bearer("token of in"), list).caller.name == "in"
    assert reason(gate, LOAD, bearer("token of in")) == "ROLE_MISSING"
    assert gate.admit(LOAD, bearer("token of op"), list).caller.tenant == ""
    assert reason(gate, STEP, bearer("token of op")) == "ROLE_MISSING"
    assert gate.admit(METRICS, bearer("token of see"), list)
    assert reason(gate, METRICS, bearer("token of in")) == "ROLE_MISSING"
    assert reason(gate, "/conveyor.v1.SessionService/NotYetKnown", bearer("token of op")) == "ROLE_MISSING"


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic dTpw"},
        {"authorization": "token of in"},
        {"authorization": "Bearer token of out"},
        {"authorization": "Bearer  token of in"},
        {"authorization": "Bearer a.b.c"},
        {"authorization": "Bearer " + "x" * 20_000},
    ],
)
def test_who_shows_nothing_that_is_known_is_nobody(write: Callable[[str], Path], metadata: dict[str, str]) -> None:
    gate = Gate(write(token("in", "acme", "infer")))
    assert reason(gate, STEP, metadata) == "CALLER_UNKNOWN"


def test_whoever_balances_load_needs_no_token(write: Callable[[str], Path]) -> None:
    gate = Gate(write(token("in", "acme", "infer")))
    for path in OPEN:
        assert gate.admit(path, {}, list).caller.roles == frozenset()


def test_a_tenant_is_acted_for_by_who_may(write: Callable[[str], Path]) -> None:
    both = token("in", "acme", "infer") + token("proxy", "*", "infer")
    gate = Gate(write(f"{both}[tenants.acme]\nmax_sessions = 3\n"))
    assert gate.admit(STEP, bearer("token of in", "acme"), list).caller.tenant == "acme"
    assert reason(gate, STEP, bearer("token of in", "other")) == "MESSAGE_INVALID"
    for_acme = gate.admit(STEP, bearer("token of proxy", "acme"), list).caller
    assert (for_acme.tenant, for_acme.max_sessions) == ("acme", 3)
    assert gate.admit(STEP, bearer("token of proxy"), list).caller.tenant == ""


def test_certificates_and_who_shows_nothing(write: Callable[[str], Path]) -> None:
    text = '[[certificates]]\nname = "device"\ntenant = "field"\nroles = ["infer"]\n'
    gate = Gate(write(text))
    assert gate.admit(STEP, {}, lambda: ["other", "device"]).caller.tenant == "field"
    assert reason(gate, STEP, {}, ("other",)) == "CALLER_UNKNOWN"
    # A token that does not count is not made good by a certificate.
    assert reason(gate, STEP, bearer("nonsense"), ("device",)) == "CALLER_UNKNOWN"
    gate = Gate(write(text + '[anonymous]\ntenant = "public"\nroles = ["observe"]\n'))
    assert gate.admit(METRICS, {}, list).caller.tenant == "public"
    assert reason(gate, STEP, {}) == "ROLE_MISSING"


def test_jwts(write: Callable[[str], Path], jwks: Path, signer: Signer) -> None:
    now = time.time()
    clock = Clock()
    clock.now = now
    gate = Gate(write(JWT), wall=clock)
    good = signer.token(sub="me", tenant="acme", roles=["infer"], exp=now + 60)
    for _ in range(2):
        admitted = gate.admit(STEP, bearer(good), list)
        assert (admitted.caller.name, admitted.caller.tenant) == ("me", "acme")
        assert admitted.until == pytest.approx(now + 60, abs=1)
    for wrong in ({"tenant": "*"}, {"tenant": "a/b"}, {"tenant": ""}, {"roles": ["root"]}, {"aud": "x"}):
        assert reason(gate, STEP, bearer(signer.token(**wrong))) == "CALLER_UNKNOWN"
    assert reason(gate, STEP, bearer(signer.token(roles=[]))) == "ROLE_MISSING"


def test_a_jwt_that_was_remembered_ends_when_it_ends(
    write: Callable[[str], Path], jwks: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    clock.now = time.time()
    gate = Gate(write(JWT), wall=clock)
    soon = signer.token(exp=clock.now + 60)
    assert gate.admit(STEP, bearer(soon), list)
    clock.now += 61
    # PyJWT has a clock of its own.
    import jwt.api_jwt

    class Later(jwt.api_jwt.datetime):  # type: ignore[misc,name-defined]
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + jwt.api_jwt.timedelta(seconds=61)

    monkeypatch.setattr(jwt.api_jwt, "datetime", Later)
    assert reason(gate, STEP, bearer(soon)) == "CALLER_UNKNOWN"


def test_files_that_change_count_soon_and_those_that_cannot_be_used_do_not(
    write: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    caplog.set_level("INFO", "conveyor")
    gate = Gate(write(token("in", "acme", "infer")), clock=clock)
    write(token("other", "acme", "infer"))
    assert gate.admit(STEP, bearer("token of in"), list), "it is looked once a second"
    assert gate.admit(STEP, bearer("token of other"), list), "what is new counts at once"
    assert reason(gate, STEP, bearer("token of in")) == "CALLER_UNKNOWN"
    assert gate.admit(STEP, bearer("token of other"), list)
    assert gate.generation == 1
    for text in ("[[tokens]]", "nonsense"):
        write(text)
        for _ in range(3):
            clock.now += 1.0
            assert gate.admit(STEP, bearer("token of other"), list)
    path = write(token("in", "acme", "infer"))
    assert gate.admit(STEP, bearer("token of in"), list)
    path.unlink()
    clock.now += 1.0
    assert gate.admit(STEP, bearer("token of in"), list)
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 3, "each is said once"


def test_keys_that_are_taken_back_count_no_more(write: Callable[[str], Path], jwks: Path, signer: Signer) -> None:
    clock = Clock()
    gate = Gate(write(JWT), clock=clock)
    held = signer.token()
    assert gate.admit(STEP, bearer(held), list)
    new = Signer("k2")
    replaced = jwks.with_suffix(".new")
    replaced.write_text(json.dumps({"keys": [new.public()]}))
    replaced.replace(jwks)
    clock.now += 1.0
    assert reason(gate, STEP, bearer(held)) == "CALLER_UNKNOWN"
    assert gate.admit(STEP, bearer(new.token()), list)


def test_a_file_that_cannot_be_used_at_the_beginning_stops_the_server(write: Callable[[str], Path]) -> None:
    with pytest.raises(StartError):
        Gate(write("nonsense"))


@pytest.mark.parametrize("tenant", ["a", "acme", "acme-2", "Z.z_9"])
def test_names_of_a_tenant_lie_between_its_bounds_and_no_others(tenant: str) -> None:
    first, behind = bounds(tenant)
    for session in ("!", "a", "zzz", "~", "0", "a:b"):
        name = full_name(tenant, session)
        assert first < name < behind
        assert name.startswith(prefix(tenant))
        assert public_name(name) == session
    for other in (f"{tenant}0/x", f"{tenant}-/x", "x", f"{tenant}.x", tenant):
        assert not first < other < behind
    assert public_name("x") == "x"
