"""What is chosen for which run times, and that what is given stays."""

import pytest
from conveyor_server.repository.policy import INLINE_RUN_S, BatchPolicy, Bounds, Overrides, choose

US, MS = 1e-6, 1e-3
# Rows of one time step, then chunks of one row, then chunks beside each other.
LSTM_256 = {
    **{(1, 1): 32 * US, (8, 1): 75 * US, (32, 1): 210 * US, (128, 1): 720 * US, (256, 1): 1400 * US},
    **{(1, 4): 100 * US, (1, 16): 400 * US, (1, 64): 1500 * US, (8, 16): 1000 * US},
}
GRU_16 = {
    **{(1, 1): 18 * US, (8, 1): 20 * US, (32, 1): 25 * US, (128, 1): 45 * US, (256, 1): 75 * US},
    **{(1, 4): 19 * US, (1, 16): 30 * US, (1, 64): 80 * US, (8, 16): 40 * US},
}


def bounds(policy: BatchPolicy) -> tuple[int, int, int, int]:
    return policy.max_batch, policy.quantum, policy.max_batch_time_steps, policy.inline_rows


def test_an_lstm_of_256_units():
    """The model itself gains nothing beyond 128 rows; one run for a frame of 256 sessions instead of two does.

    A chunk of 64 would take longer than the 1.4 ms of a full batch, one of 32 does not; and a run of chunks already
    takes as long as that with as many time steps as a full batch has.
    """
    policy = choose(LSTM_256)
    assert bounds(policy) == (256, 32, 256, 256)
    assert (policy.inline_run_s, policy.given) == (INLINE_RUN_S, frozenset())


def test_a_tiny_model_is_all_overhead_so_runs_are_large():
    assert bounds(choose(GRU_16)) == (256, 64, 1024, 256)


def test_rows_that_are_never_cheaper_together_run_alone():
    linear = {(rows, 1): rows * 80 * MS for rows in (1, 8)}
    assert bounds(choose(linear)) == (1, 1, 1, 0)


def test_a_slow_model_whose_rows_are_nearly_free_beside_the_first_is_batched():
    """80 ms of weights to read: a batch shares that, and holding it to 5 ms would only lengthen the queue."""
    shared = {(1, 1): 80 * MS, (8, 1): 82 * MS, (32, 1): 100 * MS, (128, 1): 400 * MS}
    assert bounds(choose(shared))[0] == 32


def test_a_run_stays_under_5_ms_where_that_costs_little():
    """Every row costs 100 us: 64 of them would be 4 % cheaper than 32, and hold everybody for 6.6 ms."""
    policy = choose({(rows, 1): (200 + 100 * rows) * US for rows in (1, 8, 32, 128, 256)})
    assert policy.max_batch == 32
    assert policy.inline_rows == 32


def test_a_run_grows_beyond_5_ms_while_doubling_it_costs_less_than_half_as_much_again():
    weights = {(1, 1): 2.2 * MS, (8, 1): 4.6 * MS, (32, 1): 8.6 * MS, (128, 1): 25 * MS, (256, 1): 49 * MS}
    assert choose(weights).max_batch == 32


def test_no_setting_goes_beyond_what_the_model_can_run():
    one_row = choose({(1, 1): 80 * US}, Overrides(max_batch=64, quantum=8), Bounds(rows=1, time_steps=1))
    assert (one_row.max_batch, one_row.quantum) == (1, 1)
    assert (one_row.given, one_row.bound) == (set(), {"max_batch", "quantum"})
    assert str(one_row).startswith("max_batch 1 (the model's most), quantum 1 (the model's most), ")
    steps_only = choose(LSTM_256, Overrides(max_batch=64), Bounds(time_steps=1))
    assert (steps_only.max_batch, steps_only.quantum, steps_only.allows(64, 1)) == (64, 1, True)
    assert (steps_only.given, steps_only.bound) == ({"max_batch"}, {"quantum"})
    assert choose(LSTM_256, None, Bounds()) == choose(LSTM_256)
    within = choose(LSTM_256, Overrides(max_batch=4), Bounds(rows=8))
    assert (within.max_batch, within.given, within.bound) == (4, {"max_batch"}, set())


def test_of_sizes_that_are_about_as_good_the_smallest():
    """What is saved is the server's own 100 us a run: 10 % of a row of 0.9 ms, less than 3 % of one of 3 ms."""
    assert choose({(rows, 1): rows * 0.9 * MS for rows in (1, 8)}).max_batch == 2
    assert choose({(rows, 1): rows * 3 * MS for rows in (1, 8)}).max_batch == 1


@pytest.mark.parametrize(("largest", "chosen"), [(1, 1), (2, 2), (3, 2), (6, 4), (8, 8)])
def test_a_slab_of_few_rows_bounds_the_batch(largest, chosen):
    few = {(rows, 1): (20 + rows) * US for rows in {1, largest}}
    policy = choose(few)
    assert policy.max_batch == chosen
    assert policy.inline_rows == chosen


def test_only_the_least_is_known():
    assert bounds(choose({(1, 1): 10 * US})) == (1, 32, 32, 1)
    assert bounds(choose({(1, 1): 10.0})) == (1, 1, 1, 0)


def test_a_disturbed_measurement_changes_nothing():
    """What else the machine does only adds to a run: the larger run that was faster tells, and smaller ones do."""
    undisturbed = choose(LSTM_256)
    for size in ((1, 1), (8, 1), (32, 1), (128, 1), (1, 4), (1, 16)):
        assert choose(LSTM_256 | {size: 20 * MS}) == undisturbed
    assert choose(LSTM_256 | {(256, 1): 20 * MS}).max_batch == undisturbed.max_batch


@pytest.mark.parametrize("noise", [0.98, 1.02])
def test_the_choice_does_not_hang_by_a_hair(noise):
    for size, run_s in LSTM_256.items():
        assert choose(LSTM_256 | {size: run_s * noise}) == choose(LSTM_256)


def test_what_is_given_is_taken_and_the_rest_follows():
    policy = choose(LSTM_256, Overrides(max_batch=4))
    assert (policy.max_batch, policy.inline_rows, policy.given) == (4, 4, {"max_batch"})
    # A full batch of four is over soon: chunks may take 0.5 ms.
    assert (policy.quantum, policy.max_batch_time_steps) == (16, 16)

    policy = choose(LSTM_256, Overrides(quantum=100, inline_run_s=0.0))
    assert bounds(policy) == (256, 100, 256, 0)
    assert policy.given == {"quantum", "inline_run_s"}

    policy = choose(LSTM_256, Overrides(max_batch_time_steps=7, inline_run_s=0.3 * MS))
    assert (policy.max_batch_time_steps, policy.inline_rows) == (7, 32)


def test_a_given_batch_beyond_what_was_measured():
    """Run times grow in proportion beyond the largest that was measured."""
    policy = choose(LSTM_256, Overrides(max_batch=1000))
    assert (policy.max_batch, policy.max_batch_time_steps, policy.inline_rows) == (1000, 1024, 512)


def test_everything_given_is_everything_kept():
    given = Overrides(max_batch=3, quantum=5, max_batch_time_steps=9, inline_run_s=1.0)
    policy = choose(LSTM_256, given)
    assert policy == BatchPolicy(3, 5, 9, 1.0, 3, frozenset(Overrides.__dataclass_fields__))


def test_which_runs_the_scheduler_may_form():
    policy = choose(LSTM_256, Overrides(max_batch=8, quantum=4, max_batch_time_steps=2))
    assert [policy.allows(*size) for size in ((1, 1), (1, 4), (2, 1))] == [True] * 3
    assert [policy.allows(*size) for size in ((1, 5), (2, 2), (8, 1))] == [False] * 3


def test_it_says_itself_in_the_log():
    assert str(choose(LSTM_256, Overrides(quantum=8))) == (
        "max_batch 256, quantum 8 given, max_batch_time_steps 256, inline_run_s 0.004 (up to 256 sessions)"
    )
    assert str(choose({(1, 1): 10.0})).endswith("inline_run_s 0.004 (no sessions)")
