"""What `conveyor doctor` finds of the machine: clock, limits, versions, device; each good and not."""

import pytest
from conveyor_server.doctor import clock, devices, limits, runtime
from conveyor_server.doctor.finding import Level, bad, good, warning
from conveyor_server.doctor.limits import Machine
from conveyor_server.doctor.models import Readable
from conveyor_server.settings import Settings

GOOD, WARNING, BAD = Level.GOOD, Level.WARNING, Level.BAD
LARGE = Machine(files=100_000, hard_files=100_000, cpus=8, quota=None, memory_bytes=32 << 30)


def machine(**kwargs):
    return Machine(**{**{name: getattr(LARGE, name) for name in LARGE.__slots__}, **kwargs})


def test_what_is_not_good_says_what_to_do_and_only_that():
    assert (good("x").level, warning("x", "y").level, bad("x", "y").level) == (0, 1, 2)
    for level, fix in ((WARNING, ""), (BAD, ""), (GOOD, "y")):
        with pytest.raises(ValueError, match="says what to do"):
            type(good("x"))(level, "x", fix)


@pytest.mark.parametrize(
    ("state", "several", "level", "words"),
    [
        (0, True, GOOD, "is kept right"),
        (5, False, GOOD, "one server alone"),
        (5, True, WARNING, "tell sessions"),
        ("EPERM", True, GOOD, "cannot be asked here (EPERM)"),
    ],
)
def test_clock(state, several, level, words):
    finding = clock.judged(state, several=several)
    assert (finding.level, words in finding.what) == (level, True), finding


def test_the_kernel_is_asked_about_the_clock():
    (finding,) = clock.check(Settings())
    assert finding.level is GOOD, "one server"


def test_open_files():
    settings = Settings(max_sessions=10_000)
    assert limits.files(settings, LARGE).level is GOOD
    few = limits.files(settings, machine(files=1024))
    assert few.level is WARNING
    assert "768 connections" in few.what
    assert "LimitNOFILE=10256" in few.fix
    assert "hard limit" not in few.fix
    assert "the hard limit 4,096" in limits.files(settings, machine(files=1024, hard_files=4096)).fix


def test_memory_for_every_session_of_every_model():
    models = [Readable("a", "1", 1 << 20, 50_000_000), Readable("b", "1", 1 << 10, 0)]
    settings = Settings(max_sessions=1_000)
    finding = limits.memory(settings, LARGE, models)
    assert finding.level is GOOD
    # 1,000 sessions and two batches of 256.
    assert f"{1512 * (1025 << 10) / 1e9:.1f} GB of state for 2 models, 50 MB of weights" in finding.what
    assert limits.memory(settings, machine(memory_bytes=1_900_000_000), models).level is WARNING
    assert limits.memory(settings, machine(memory_bytes=1_000_000_000), models).level is BAD
    assert limits.memory(Settings(max_sessions=1_000, workers=30), LARGE, models).level is BAD, "each has its own"
    assert limits.memory(settings, machine(memory_bytes=None), models).level is GOOD
    bounded = limits.memory(Settings(max_sessions=1_000, max_state_bytes=1_000_000_000), LARGE, models)
    assert (bounded.level, "max_state_bytes is 1.0 GB" in bounded.what) == (BAD, True)


@pytest.mark.parametrize(
    ("threads", "workers", "cpus", "quota", "level"),
    [
        (1, 1, 1, None, GOOD),
        (2, 2, 4, None, GOOD),
        (2, 2, 4, 3.5, WARNING),
        (4, 1, 2, None, WARNING),
        (1, 1, 8, 0.5, WARNING),
        (1, 1, 8, 1.0, GOOD),
    ],
)
def test_threads_and_workers_against_cpus(threads, workers, cpus, quota, level):
    (finding,) = limits.cpu(Settings(threads=threads, workers=workers), machine(cpus=cpus, quota=quota))
    assert finding.level is level, finding


def test_limits_of_control_groups_of_either_version(tmp_path):
    assert limits.cpu_quota(tmp_path) is limits.memory_limit(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "memory").mkdir()
    for name, text in {
        "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "memory/memory.limit_in_bytes": "9000\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert (limits.cpu_quota(tmp_path), limits.memory_limit(tmp_path)) == (None, 9000)
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("250000\n")
    assert limits.cpu_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert (limits.cpu_quota(tmp_path), limits.memory_limit(tmp_path)) == (1.5, None)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "cpu/cpu.cfs_quota_us").unlink()
    assert limits.cpu_quota(tmp_path) is None


def test_this_machine_can_be_looked_at():
    found = limits.look()
    assert found.cpus >= 1
    assert found.files > 0
    assert found.memory_bytes is not None


def test_python():
    assert runtime.python((3, 11), "3.11.2").level is GOOD
    assert runtime.python((3, 10), "3.10.9").level is BAD


@pytest.mark.parametrize(
    ("transport", "version", "tested", "why_not", "level", "words"),
    [
        ("auto", "1.2", ("1.1", "1.2"), "", GOOD, "was tested with grpcio 1.2"),
        ("auto", "1.3", ("1.1", "1.2"), "", WARNING, "this is 1.3"),
        ("cq", "1.3", ("1.1", "1.2"), "", WARNING, "this is 1.3"),
        ("auto", "2.0", (), "it has none", WARNING, "will be aio"),
        ("cq", "2.0", (), "it has none", BAD, "cannot be used"),
        ("aio", "2.0", (), "it has none", GOOD, "public API"),
    ],
)
def test_transport(transport, version, tested, why_not, level, words):
    finding = runtime.transport(Settings(transport=transport), version, tested, why_not)
    assert (finding.level, words in finding.what) == (level, True), finding
    assert ("grpcio==1.2" in finding.fix) == (level is not GOOD and bool(tested))


def test_the_compiled_part_and_telemetry():
    assert runtime.built(is_built=True).level is GOOD
    assert "C compiler" in runtime.built(is_built=False).fix
    assert runtime.telemetry(None).level is runtime.telemetry("1").level is GOOD
    assert runtime.telemetry("0").level is WARNING


def test_this_installation():
    assert [finding.level for finding in runtime.check(Settings())].count(BAD) == 0


@pytest.mark.parametrize(
    ("device", "offered", "why_not", "has_gpu", "level", "words"),
    [
        ("cpu", False, "none", True, GOOD, "device cpu"),
        ("cuda", True, "", True, GOOD, "opened on CUDA"),
        ("auto", True, "", True, GOOD, "opened on CUDA"),
        ("cuda", False, "this onnxruntime has no CUDA", False, BAD, "no CUDA"),
        ("cuda", True, "fell back", True, BAD, "fell back"),
        ("auto", True, "fell back", True, WARNING, "fell back"),
        ("auto", False, "no CUDA", True, WARNING, "has a GPU"),
        ("auto", False, "no CUDA", False, GOOD, "no GPU"),
    ],
)
def test_device(device, offered, why_not, has_gpu, level, words):
    finding = devices.judged(device, offered=offered, why_not=why_not, has_gpu=has_gpu)
    assert (finding.level, words in finding.what) == (level, True), finding


def test_two_builds_of_onnxruntime_are_one_too_many(monkeypatch):
    monkeypatch.setattr(devices, "_is_installed", lambda _: True)
    assert [each.level for each in devices.check(Settings(device="cpu"))] == [WARNING, GOOD]
    monkeypatch.setattr(devices, "_is_installed", lambda name: name == "onnxruntime")
    assert [each.level for each in devices.check(Settings(device="cpu"))] == [GOOD]


def test_cuda_is_really_tried():
    """Here is none; the probe itself is a graph that loads, for what it is refused for is CUDA alone."""
    (finding,) = (each for each in devices.check(Settings(device="cuda")) if "device" in each.what)
    assert finding.level is BAD
    assert "CUDA" in finding.what
