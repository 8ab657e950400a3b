"""From segments to ratios and verdicts: ratios are taken within a round, void rounds count nowhere."""

from dataclasses import replace

import pytest

from benchmarks.accounting import Usage
from benchmarks.cases import LSTM, Case, Client, Group, Target, choose, groups
from benchmarks.figures import Done, Figures
from benchmarks.goals import GOALS, Goal, judge, verdict
from benchmarks.profile import explain
from benchmarks.report import Spread, interpolate, report_of
from benchmarks.segments import Segment, why_void
from benchmarks.table import format_goals, format_ratios, format_rows, format_void

TOKENS = 1000


def _segment(case, round_=0, *, server_s=0.1, p50_s=1e-3, batch=1.0, void=False, client_bound=False):
    return Segment(
        case=case.name,
        round=round_,
        done=Done(TOKENS, TOKENS),
        usage=Usage(1.0, server_s, 0.1, 0.0, 0.0),
        figures=Figures(p50_s, 2 * p50_s, 5, 6, case.streams, 5, 6),
        mean_batch=batch,
        client_bound=client_bound,
        void=("others used 0.50 cores",) if void else (),
    )


@pytest.fixture
def group():
    return next(group for group in groups(256) if group.name == "stream-1")


def _report(group, **by_target):
    """A report of rounds in which the case of a target was as the keywords say: `target=[keywords, ...]`."""
    segments = [
        _segment(case, round_, **keywords)
        for case in group.cases
        for round_, keywords in enumerate(by_target.get(case.target.name.lower(), []))
    ]
    return report_of(group, segments)


def _rounds(*seconds, **others):
    return [{"server_s": value, **others} for value in seconds]


def _three(group, **given):
    named = {case.target.name.lower() for case in group.cases}
    return _report(group, **{name: given.get(name, _rounds(0.1, 0.1, 0.1)) for name in named})


def test_a_ratio_is_taken_within_each_round(group):
    report = _three(group, null=_rounds(0.2, 0.2, 0.1), echo=_rounds(0.1, 0.2, 0.2))
    spread = report.ratios.null_to_echo
    assert (spread.low, spread.median, spread.high) == pytest.approx((0.5, 1.0, 2.0))
    assert spread.counted == 3


def test_the_ceiling_is_what_echo_and_model_cost_together(group):
    report = _three(group, full=_rounds(0.5, 0.5, 0.5), echo=_rounds(0.2, 0.2, 0.2), cq_echo=_rounds(0.1, 0.1, 0.1))
    # 200 us of Echo and 100 us of the model, of 500; with the bare echo 100 and 100.
    assert report.ratios.to_ceiling.median == pytest.approx(0.6)
    assert report.ratios.to_bare_ceiling.median == pytest.approx(0.4)
    assert report.ratios.echo_to_bare_echo.median == pytest.approx(0.5)
    assert report.ratios.to_bare.median == pytest.approx(0.2)


def test_the_ceiling_has_the_model_at_the_mean_batch_of_that_round():
    group = next(group for group in groups(256) if group.name == "streams-16")
    segments = [
        _segment(case, server_s={1: 0.030, 16: 0.006}.get(case.sessions if case.target is Target.BARE else 0, 0.1))
        for case in group.cases
        if case.target is not Target.FULL
    ]
    full = group.case(Target.FULL)
    report = report_of(group, [*segments, _segment(full, server_s=0.2, batch=6.0)])
    # A run takes 30 us at 1 and 96 us at 16, so 52 us at 6.
    assert report.ratios.to_ceiling.median == pytest.approx((100 + 52 / 6) / 200)


def test_a_lone_session_s_overhead_is_what_echo_and_a_bare_step_do_not_explain(group):
    report = _three(
        group,
        full=[{"p50_s": 200e-6}] * 3,
        echo=[{"p50_s": 100e-6}, {"p50_s": 110e-6}, {"p50_s": 90e-6}],
        bare=[{"p50_s": 50e-6}] * 3,
    )
    spread = report.ratios.overhead_us
    assert (spread.low, spread.median, spread.high) == pytest.approx((40, 50, 60))


def test_a_void_round_counts_nowhere_while_another_does(group):
    void = {"server_s": 0.9, "void": True}
    report = _three(group, null=[void, *_rounds(0.2, 0.4)], echo=[*_rounds(0.1), void, *_rounds(0.1)])
    assert (report.ratios.null_to_echo.counted, report.ratios.null_to_echo.high) == (1, pytest.approx(0.25))
    row = report.row(Target.NULL)
    assert (row.server_us_per_token.counted, row.server_us_per_token.high) == (2, pytest.approx(400))


def test_what_is_made_of_void_rounds_alone_is_shown_and_says_so(group):
    report = _three(group, null=_rounds(0.2, 0.2, 0.2, void=True))
    assert report.ratios.null_to_echo.median == pytest.approx(0.5)
    assert report.ratios.null_to_echo.counted == 0
    assert verdict(report.ratios.null_to_echo, 0.4, at_least=True) == "void"


def test_a_client_at_its_limit_is_told_of_the_echo_s_ratios_only(group):
    report = _three(group, echo=_rounds(0.1, 0.1, 0.1, client_bound=True))
    assert report.ratios.null_to_echo.client_bound == 3
    assert report.ratios.to_ceiling.client_bound == 3
    assert report.ratios.to_bare.client_bound == report.ratios.to_bare_ceiling.client_bound == 0


def test_a_segment_measured_again_takes_the_place_of_the_one_before():
    case = Case("g/full", "Full", Client.MESSAGES, Target.FULL, LSTM, 1)
    report = report_of(Group("g", "G", (case,)), [_segment(case, void=True), _segment(case, server_s=0.3)])
    assert report.rows[0].server_us_per_token.counted == 1
    assert report.rows[0].server_us_per_token.median == pytest.approx(300)


def test_the_model_s_time_between_two_batches_lies_on_the_line_of_whole_runs():
    known = {1: 30.0, 16: 6.0, 256: 5.0}
    assert [interpolate(batch, known) for batch in (1, 16, 256)] == pytest.approx([30.0, 6.0, 5.0])
    assert interpolate(6, known) == pytest.approx(52 / 6)
    # Beyond what was measured nothing is guessed.
    assert interpolate(0.5, known) == pytest.approx(30.0)
    assert interpolate(1000, known) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("median", "at_least", "text"),
    [(0.90, True, "PASS"), (0.89, True, "below"), (40.0, False, "above"), (0.90, False, "PASS")],
)
def test_a_verdict_is_about_the_median(median, at_least, text):
    assert verdict(Spread(median, 0.1, 99.0, 5), 0.90, at_least=at_least) == text
    assert verdict(Spread(median, 0.1, 99.0, 5, 1), 0.90, at_least=at_least) == f"{text}, client-bound"


def test_goals_of_groups_that_were_not_measured_have_no_verdict(group):
    verdicts = judge([_three(group)])
    assert {item.label for item in verdicts} == {group.label}
    assert len(verdicts) == sum(goal.group == group.name for goal in GOALS) == 3
    assert judge([]) == []


def test_every_goal_names_a_group_that_measures_it():
    found = {group.name: group for group in groups(256)}
    reports = [
        report_of(group, [_segment(case, round_) for case in group.cases for round_ in range(2)])
        for group in found.values()
    ]
    assert {goal.group for goal in GOALS} <= set(found)
    assert len(judge(reports)) == len(GOALS)


def test_the_figure_of_a_goal_is_its_own():
    goals = [Goal("streams", "tokens per second", lambda report: report.row(Target.FULL).tokens_per_s, 500)]
    group = next(group for group in groups(256) if group.name == "streams")
    report = report_of(group, [_segment(case) for case in group.cases])
    (found,) = judge([report], goals)
    assert (found.value.median, found.text) == (TOKENS, "PASS")


@pytest.mark.parametrize(
    ("target", "client", "usage", "figures", "why"),
    [
        (Target.FULL, Client.MESSAGES, {}, {}, []),
        (Target.FULL, Client.MESSAGES, {"client_s": 0.85}, {}, ["the client took 0.85 cores"]),
        (Target.NULL, Client.FRAMES, {"client_s": 0.85}, {}, ["the client took 0.85 cores"]),
        (Target.ECHO, Client.MESSAGES, {"client_s": 0.85}, {}, []),
        (Target.CQ_ECHO, Client.MESSAGES, {"client_s": 0.85}, {}, []),
        (Target.FULL, Client.PIPELINE, {"client_s": 0.85}, {}, []),
        (Target.ECHO, Client.MESSAGES, {"foreign_s": 0.11}, {}, ["others used 0.11 cores"]),
        (Target.ECHO, Client.MESSAGES, {}, {"fewest": 0}, ["a session was not served"]),
        (Target.FULL, Client.MESSAGES, {}, {"streams": 3}, ["5 streams were not served"]),
    ],
)
def test_what_makes_a_segment_void(target, client, usage, figures, why):
    case = Case("g/x", "X", client, target, LSTM, 8, streams=8)
    used = replace(Usage(1.0, 0.5, 0.5, 0.0, 0.0), **usage)
    assert why_void(case, used, replace(Figures(1e-3, 2e-3, 5, 6, 8, 5, 6), **figures)) == why


def test_the_cases_of_a_group_put_the_same_load_on_every_target():
    for group in groups(256):
        asked = [case for case in group.cases if case.target is not Target.BARE]
        if group.name not in {"curve", "sdk-session"}:
            loads = {(case.client, case.model, case.sessions, case.streams, case.connections) for case in asked}
            assert len(loads) == 1, group.name
            assert len({case.target for case in asked}) == len(asked)
    names = [case.name for group in groups(256) for case in group.cases]
    assert len(names) == len(set(names))


def test_beside_aio_stands_the_echo_of_its_own_kind_and_only_main_groups():
    main = groups(256, "aio", main=True)
    assert [group.name for group in main] == ["frames-1", "stream-1", "streams", "connections"]
    assert not any(case.target is Target.CQ_ECHO for group in main for case in group.cases)


def test_groups_are_chosen_by_pattern():
    found = groups(256)
    assert choose(found, []) == found
    assert [group.name for group in choose(found, ["stream-*", "curve"])] == ["stream-1", "curve"]
    assert choose(found, ["nothing"]) == []


def test_the_tables_show_every_case_ratio_and_verdict(group):
    report = _three(group, echo=_rounds(0.1, 0.1, 0.1, client_bound=True), null=_rounds(0.2, 0.2, 0.2, void=True))
    rows = format_rows([report], 3).splitlines()
    assert len(rows) == 2 + len(group.cases)
    assert rows[2].endswith("3/3 client-bound")
    assert rows[3].endswith("0/3")
    assert "0.50 (0.50-0.50) 0/3" in format_ratios([report], 3)
    goals = format_goals(judge([report]), 3)
    assert "void" in goals
    assert "PASS, client-bound" in goals
    void = format_void([_segment(case, void=True) for case in group.cases])
    assert void.startswith(f"{len(group.cases)} of {len(group.cases)} segments are void")


def test_a_profiler_that_may_not_look_is_explained():
    assert "SYS_PTRACE" in explain("Error: Permission Denied: Try running again with elevated permissions")
    assert "SYS_PTRACE" in explain("Operation not permitted (os error 1)")
    assert explain("Error: no such process\n") == "py-spy failed: Error: no such process"
