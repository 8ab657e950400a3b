"""Where settings come from, and what is said of those that are none."""

import dataclasses
from pathlib import Path

import pytest
from conveyor_server.configuration import load
from conveyor_server.errors import StartError
from conveyor_server.settings import Settings


@pytest.fixture
def config(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "conveyor.toml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults() -> None:
    assert load([], {}) == Settings()
    assert Settings().host == "127.0.0.1"


def test_flag_over_environment_over_file_over_default(config) -> None:
    path = config('port = 1\nthreads = 2\nmax_batch = 3\ndevice = "cpu"\n')
    environment = {"CONVEYOR_PORT": "11", "CONVEYOR_THREADS": "12", "HOME": "/"}
    settings = load(["--config", path, "--port", "21"], environment)
    assert (settings.port, settings.threads, settings.max_batch, settings.device) == (21, 12, 3, "cpu")
    assert settings.quantum == Settings().quantum


def test_the_file_can_be_named_in_the_environment(config) -> None:
    assert load([], {"CONVEYOR_CONFIG": config("port = 5")}).port == 5


def test_types(config) -> None:
    settings = load(["--models=/m", "--drain-s", "1", "--tls-key", "k", "--tls-certificate", "c"], {})
    assert settings.models == Path("/m")
    assert (settings.drain_s, type(settings.drain_s)) == (1.0, float)
    assert (settings.tls_key, settings.tls_certificate) == (Path("k"), Path("c"))
    assert load(["--config", config("drain_s = 3")], {}).drain_s == 3.0


def test_a_bound_of_runs_is_auto_or_a_number(config) -> None:
    names = ("max_batch", "quantum", "max_batch_time_steps", "inline_run_s")
    assert [getattr(Settings(), name) for name in names] == [None] * 4
    path = config('max_batch = "auto"\nquantum = 8\nmax_batch_time_steps = 64\n')
    environment = {"CONVEYOR_MAX_BATCH": "32", "CONVEYOR_QUANTUM": "auto", "CONVEYOR_INLINE_RUN_S": "0"}
    settings = load(["--config", path, "--max-batch=auto"], environment)
    assert [getattr(settings, name) for name in names] == [None, None, 64, 0.0]
    assert load(["--config", path], environment).max_batch == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-sesions", "5"], "--max-sesions is not a flag of conveyor serve: did you mean --max-sessions?"),
        (["--port", "x"], "port = 'x' from the command line is not a whole number"),
        (["--port", "1.5"], "is not a whole number"),
        (["--port", "-1"], "is less than 0"),
        (["--drain-s", "nan"], "is not a number of seconds"),
        (["--drain-s", "inf"], "is not a number of seconds"),
        (["--max-batch", "0"], "is less than 1"),
        (["--max-batch", "all"], "max_batch = 'all' from the command line is not a whole number or auto"),
        (["--inline-run-s", "nan"], "is not a number of seconds or auto"),
        (["--max-sessions", "auto"], "max_sessions = 'auto' from the command line is not a whole number"),
        (["--device", "gpu"], "device = 'gpu' from the command line is not one of cpu, cuda, auto"),
        (["--port"], "expected one argument"),
        (["models"], "models is not a flag"),
        (["--po", "5"], "--po is not a flag of conveyor serve: did you mean --port?"),
        (["--in-flight", "300"], "in_flight is larger than max_in_flight: raise --max-in-flight too"),
        (["--idle-timeout-s", "90000"], "raise --max-idle-timeout-s too"),
        (["--tls-key", "k"], "go together"),
        (["--tls-client-ca", "k"], "--tls-client-ca needs"),
        (["--config", "/no/such.toml"], "cannot read /no/such.toml"),
    ],
)
def test_bad_flags(arguments, message) -> None:
    with pytest.raises(StartError) as caught:
        load(arguments, {})
    assert message in str(caught.value)


def test_an_unknown_name_in_the_environment() -> None:
    with pytest.raises(StartError, match=r"CONVEYOR_TREADS in the environment is not a setting.*CONVEYOR_THREADS"):
        load([], {"CONVEYOR_TREADS": "1"})


def test_what_kubernetes_says_of_a_service_called_conveyor_is_passed_over() -> None:
    links = {
        "CONVEYOR_SERVICE_HOST": "10.0.0.1",
        "CONVEYOR_SERVICE_PORT_GRPC": "50051",
        "CONVEYOR_PORT": "tcp://10.0.0.1:50051",
        "CONVEYOR_PORT_50051_TCP_ADDR": "10.0.0.1",
    }
    assert load([], links) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treads = 1", "treads in .* is not a setting: did you mean threads?"),
        ("port = true", "port = True from .* is not a whole number"),
        ("port = [1]", "is not a whole number"),
        ("port =", "is not TOML"),
    ],
)
def test_a_bad_file(config, text, message) -> None:
    with pytest.raises(StartError, match=message):
        load(["--config", config(text)], {})


def test_help_names_every_setting(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--help"], {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        assert f"--{field.name.replace('_', '-')} " in text
    assert "loaded (default: auto)" in " ".join(text.split())
