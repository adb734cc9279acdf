"""The cost model and the budget equations, by hand-worked numbers and by invariants."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darel_hf import DarelConfig
from darel_hf.budget.plan import (
    Costs,
    Plan,
    batch_size_within,
    budget_plan,
    candidate_rows,
    fresh_epochs,
    online_term,
    paper_budget,
    smallest_budget,
    solve_budget,
)


def plan(offline_keep=1.0, online_keep=1.0, rescore_every=1, epochs=5, f=0.5, cf=0.3, d=0.0, one=False, p=1.0, **more):
    costs = Costs(step_seconds=0.1, forward_share=f, offline_share=cf, data_share=d, one_forward=one, padding=p)
    settings = {"batch_size": 8, "samples": 1000, "costs": costs, **more}
    return Plan(offline_keep, online_keep, rescore_every, epochs=epochs, **settings)


# By hand: S / E + alpha * (f * ceil(E / eta) / E + d + (1 - d) A), S = c f.
@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (plan(), 1.0),
        (plan(0.8), 0.3 / 5 + 0.8),
        (plan(1.0, 0.5), 0.5 + 0.5),
        (plan(1.0, 0.5, 2), 0.5 * 3 / 5 + 0.5),
        (plan(0.8, 0.25, 5), 0.3 / 5 + 0.8 * (0.5 / 5 + 0.25)),
        (plan(0.8, 0.25, 5, scores_free=True), 0.8 * (0.5 / 5 + 0.25)),
        (plan(0.8, 0.25, 5, d=0.2), 0.3 / 5 + 0.8 * (0.5 / 5 + 0.2 + 0.8 * 0.25)),
        (plan(1.0, 0.5, one=True), 0.5 + 0.5 * (1 - 0.5)),  # f + A (1 - f)
        (plan(0.8, 0.25, 5, one=True), 0.3 / 5 + 0.8 * (0.75 * 0.5 / 5 + 0.25)),
        (plan(0.8, d=0.2), 0.3 / 5 + 0.8),
        (plan(0.8, epochs=1), 0.3 + 0.8),
        (plan(1.0, 0.5, fixed_steps=True), (0.5 + 0.5) / 0.5),
        (plan(0.8, slowdown=1.5), 1.5 * (0.3 / 5 + 0.8)),
        (plan(p=0.7), 0.7),  # the offline pass is sorted by length anyway
        (plan(0.8, 0.25, 5, d=0.2, p=0.7), 0.3 / 5 + 0.8 * (0.7 * (0.5 / 5 + 0.8 * 0.25) + 0.2)),
        (plan(0.8, d=0.2, p=0.7), 0.3 / 5 + 0.8 * (0.7 * 0.8 + 0.2)),
    ],
)
def test_predicted_time(made, expected):
    assert made.predicted_time == pytest.approx(expected)
    assert made.predicted_saving == pytest.approx(1 - expected)


def test_fresh_epochs():
    assert [fresh_epochs(eta, 5) for eta in (1, 2, 3, 5, 9)] == [5, 3, 2, 1, 1]
    assert fresh_epochs(1, 2.5) == 3
    assert online_term(1.0, 1, 5, Costs(0.1, 0.5, 0.5)) == 1.0


# Equations (1) to (4), T = 100 s, T_new as given; A before clipping decides eta.
@pytest.mark.parametrize(
    ("t", "new", "alpha", "online", "eta"),
    [
        (0.32, 100, 0.8, 0.4, 3),  # A = 32 / 80 = 0.4 <= 0.5
        (0.48, 100, 0.8, 0.5, 2),  # A = 0.6, between 0.5 and 0.8: eta 2, then clipped
        (0.40, 100, 0.8, 0.5, 3),  # A = 0.5 exactly
        (0.64, 100, 0.8, 0.5, 1),  # A = 0.8 exactly: no longer below 0.8
        (1.00, 100, 0.8, 0.5, 1),  # A = 1.25, clipped
        (0.04, 100, 0.4, 0.1, 3),  # T t = 4 <= 8: A = 0.1; T t < 0.8 * 100 * 0.1: alpha = 4 / 10
        (0.08, 100, 0.8, 0.1, 3),  # T t = 8, not above 0.1 T_new alpha = 8: A = 0.1; alpha stays
        (0.32, 200, 0.8, 0.2, 3),  # twice the time at the smaller batch: A = 32 / 160
    ],
)
def test_paper_equations(t, new, alpha, online, eta):
    assert paper_budget(100, t, new) == pytest.approx((alpha, online, eta))


@given(
    budget=st.floats(0.05, 1.0),
    f=st.one_of(st.just(0.0), st.floats(0.05, 0.6)),
    cf=st.floats(0.02, 1.2),
    epochs=st.integers(1, 10),
    batch=st.integers(1, 64),
    free=st.booleans(),
    d=st.floats(0.0, 0.3),
    one=st.booleans(),
    p=st.floats(0.5, 1.0),
)
@settings(max_examples=300, deadline=None)
def test_solved_budgets_meet_the_cost_model(budget, f, cf, epochs, batch, free, d, one, p):
    start = plan(epochs=epochs, f=f, cf=cf, d=d, one=one, p=p, batch_size=batch, scores_free=free, samples=100_000)
    with_offline, online_alone = smallest_budget(start.costs, epochs, free)
    smallest = min(with_offline, online_alone)
    if budget < smallest:
        with pytest.raises(ValueError, match=re.escape(f"smallest possible here is {smallest:.3f}")):
            solve_budget(start, budget)
        return
    if budget < with_offline:
        solved = solve_budget(start, budget)
        assert solved.offline_keep == 1 and 0.1 <= solved.online_keep <= 1
        assert solved.predicted_time <= budget * 1.001
        return
    solved = solve_budget(start, budget)
    assert 0 < solved.offline_keep <= 1 and 0 < solved.online_keep <= 1
    assert 1 <= solved.rescore_every <= epochs
    assert solved.predicted_time <= budget * 1.001
    if solved.kept < 1:  # less padding alone may be within the budget
        rows = max(solved.candidate_rows - 1, batch)  # whole rows: one candidate less is over the budget
        one_less = replace(solved, online_keep=batch / rows)
        assert solved.predicted_time >= budget * 0.9 or one_less.predicted_time > budget


@pytest.mark.parametrize(("epochs", "offline", "budget"), [(1, 0.5, 0.6), (1, 0.3, 0.5), (2, 0.5, 0.5), (3, 0.3, 0.5)])
def test_the_plan_that_keeps_most_is_taken(epochs, offline, budget):
    """An offline pass that costs most of the budget is not paid for where drawing online keeps more."""
    made = plan(epochs=epochs, f=0.0, cf=offline, d=0.02)
    solved = solve_budget(made, budget)
    assert solved.offline_keep == 1 and solved.kept >= 0.9 * budget
    assert solved.predicted_time <= budget


@pytest.mark.parametrize(
    ("batch", "epochs", "budget", "candidates", "trained"),
    [
        (4, 3, 0.975, 4, 2.925),  # 4 of 5 would leave 0.175 of the rows
        (4, 3, 0.73, 5, 2.7375),  # 4 of 5, for 0.9125 of the epochs; 4 of 6 would leave 0.063, of 0.73
        (4, 3, 0.68, 6, 3),  # 4 of 6 leave less than a twentieth
        (1, 2, 0.9, 1, 1.8),  # a batch of one row: all of it, or half of two
        (1, 3, 0.6, 2, 3),  # all of it would end in the second of three epochs
        (4, 1, 0.95, 5, 1),  # of one epoch some samples would never be seen
        (8, 3, 0.88, 9, 2.97),
    ],
)
def test_training_ends_earlier_where_whole_rows_would_leave_much(batch, epochs, budget, candidates, trained):
    made = plan(batch_size=batch, epochs=epochs, f=0.0, cf=0.6)
    solved = solve_budget(made, budget)
    assert (solved.candidate_rows, solved.offline_keep) == (candidates, 1)
    assert solved.trained_epochs == pytest.approx(trained) and solved.predicted_time <= budget * 1.001
    assert solved.kept == pytest.approx(batch / candidates * trained / epochs)
    said = str(replace(solved, budget_time=budget))
    assert (f"epochs    {trained:.2f} of {epochs}, planned so" in said) == (trained < epochs)
    assert ("training ends earlier, nothing is dropped" in said) == (candidates == batch)
    assert ("some is dropped" in said and "epochs of everything" in said) == (candidates > batch)


@given(
    budget=st.floats(0.7, 0.99),
    f=st.floats(0.0, 0.6),
    first=st.floats(1.0, 3.0),
    epochs=st.integers(2, 6),
    batch=st.integers(1, 8),
)
@settings(max_examples=200, deadline=None)
def test_what_ends_earlier_takes_what_its_epochs_take(budget, f, first, epochs, batch):
    """Epoch by epoch: the first is the dearest, candidates are scored in the first of every eta epochs."""
    made = plan(epochs=epochs, f=f, cf=3.0, batch_size=batch)
    made = replace(made, costs=replace(made.costs, first_epoch=first))
    solved = solve_budget(made, budget)
    trained, eta, keep = solved.trained_epochs, solved.rescore_every, solved.effective_online_keep
    later = epochs / (first + epochs - 1)  # a step of a later epoch, relative to the mean of all
    time = 0.0
    for epoch in range(math.ceil(trained)):
        time += (f if epoch % eta == 0 and keep < 1 else 0.0) / epochs
        time += min(trained - epoch, 1.0) * keep * later * (first if epoch == 0 else 1.0) / epochs
    assert solved.predicted_time == pytest.approx(time) and time <= budget * 1.001
    assert trained > epochs - 1


def test_an_offline_pass_that_was_made_is_paid_for_whatever_is_kept():
    dear = plan(epochs=3, f=0.0, cf=0.6, batch_size=4)
    before, after = solve_budget(dear, 0.7), solve_budget(replace(dear, passed=True), 0.7)
    assert before.offline_keep == 1 and before.predicted_time == pytest.approx(0.7, rel=0.05)
    assert after.predicted_time <= 0.7 and after.kept == pytest.approx(0.7 - 0.6 / 3, rel=0.05)
    nothing = replace(dear, passed=True)
    assert nothing.predicted_time == pytest.approx(1.2) and nothing.fewer_epochs == pytest.approx(3)
    assert "offline pass 0.60 of an epoch" in str(nothing)
    assert solve_budget(replace(dear, passed=True, scores_free=True), 0.7).kept == pytest.approx(0.7, rel=0.01)


def test_a_run_shorter_than_its_measuring_trains_on_everything():
    """Images of 160 samples in 2 epochs, where every pass costs: 0.013 of the rows before, and 0.84 of the time."""
    costs = Costs(0.0237, 0.0, 0.875, True, 0.641)
    solved = solve_budget(Plan(1.0, 1.0, 1, 16, 2, 160, costs, overhead=0.337), 0.6)
    assert solved.kept == 1 and solved.too_short(0.6)
    cheaper = solve_budget(Plan(1.0, 1.0, 1, 16, 2, 160, costs, overhead=0.0), 0.9)
    assert 0.6 < cheaper.kept < 1 and cheaper.predicted_time <= 0.9


def test_the_cost_of_measuring_is_made_up_for():
    solved = solve_budget(plan(overhead=0.03), 0.6)
    assert solved.predicted_time == pytest.approx(0.6, rel=0.01)
    tiny = solve_budget(plan(overhead=2.0), 0.6)  # a run shorter than its own probe: said, not hidden
    assert tiny.predicted_time > 2


@pytest.mark.parametrize(
    ("made", "budget"),
    [
        (plan(p=0.7), 0.75),
        (plan(p=0.4, f=0.0, cf=0.45, epochs=1), 0.5),
        (plan(p=0.5, f=0.0, cf=1.2, epochs=1), 0.8),  # the offline pass alone would not fit
    ],
)
def test_nothing_is_dropped_where_less_padding_is_enough(made, budget):
    solved = solve_budget(made, budget)
    assert (solved.offline_keep, solved.online_keep) == (1, 1)
    assert solved.predicted_time == made.costs.padding


def test_every_group_keeps_a_place():
    config = DarelConfig(budget_time=0.5, group_column="mr")
    free, dear = plan(scores_free=True), plan()
    few, many = budget_plan(free, config, 400), budget_plan(dear, config, 900)
    assert few == solve_budget(free, 0.5) and few.offline_keep < 0.9
    assert many.offline_keep == 1 and many.online_keep < 1 and many.predicted_time <= 0.501
    with pytest.raises(ValueError, match=r"smallest possible here is 0\.200"):  # 0.5 / 5 + 0.1
        budget_plan(plan(), DarelConfig(budget_time=0.15, group_column="mr"), 900)
    with pytest.raises(ValueError, match="group_column='mr': has 900 values, but the budget leaves 800 places"):
        budget_plan(plan(), DarelConfig(budget_time=0.5, budget_method="paper", group_column="mr"), 900)


def test_without_an_offline_pass_where_that_can_be():
    """What only an offline pass makes possible is planned with one all the same."""
    config, made = DarelConfig(budget_time=0.5), plan()
    assert budget_plan(made, config, offline=False) == solve_budget(made, 0.5, offline=False)
    assert budget_plan(made, config, offline=False).offline_keep == 1
    dear = plan(costs=replace(made.costs, forward_share=0.9, offline_share=0.2))
    tight, one = DarelConfig(budget_time=0.4), replace(dear, epochs=1.0)
    assert budget_plan(one, tight, offline=False) == solve_budget(one, 0.4)
    assert solve_budget(one, 0.4).offline_keep < 1
    with pytest.raises(ValueError, match="smallest possible"):
        solve_budget(one, 0.4, offline=False)


def test_nothing_is_dropped_where_it_saves_no_step():
    made = plan(fixed_steps=True, slowdown=1.2)
    assert solve_budget(made, None) == replace(made, method="measured")


def test_a_slower_batch_size_leaves_less():
    fast, slow = solve_budget(plan(), 0.6), solve_budget(plan(slowdown=1.2), 0.6)
    assert slow.predicted_time == pytest.approx(fast.predicted_time, rel=0.02)
    assert slow.offline_keep * slow.online_keep < fast.offline_keep * fast.online_keep


def test_memory_alone_asks_for_no_time():
    made = plan(slowdown=1.2)
    assert solve_budget(made, None) == solve_budget(made, 1.0)
    assert solve_budget(plan(slowdown=1.3, f=0.0, cf=3.0, batch_size=4), None).more == 1
    hopeless = plan(slowdown=20.0)
    with pytest.raises(ValueError, match=r"budget_time=1\.0: cannot be met"):
        solve_budget(hopeless, 1.0)
    solved = solve_budget(hopeless, None)
    assert (solved.offline_keep, solved.online_keep) == (1, 1)
    assert solved.predicted_time == pytest.approx(20)


def test_candidates():
    assert [candidate_rows(8, keep) for keep in (1.0, 0.5, 0.3, 0.99)] == [8, 16, 27, 8]


def test_batch_size_within_memory():
    def memory(rows):
        return 100 + 10 * rows

    assert batch_size_within(memory, 32, 1.0) == 32
    assert batch_size_within(memory, 32, 0.5) == 11  # 100 + 10 b <= 210
    with pytest.raises(ValueError, match=r"one row needs 0\.262"):
        batch_size_within(memory, 32, 0.2)
    assert batch_size_within(lambda rows: 100, 32, 1.0) == 32


def test_plan_survives_json():
    made = plan(0.8, 0.3, 2)
    assert Plan.from_dict(made.to_dict()) == made
    assert math.isclose(made.predicted_time, Plan.from_dict(made.to_dict()).predicted_time)


def test_the_printed_plan_has_what_a_reader_needs():
    text = str(plan(0.8, 0.3, 3))
    for part in ("keep 0.800: 800 of 1,000 samples", "8 of 27 candidates", "every 3 epoch", "measured", "0.46 of"):
        assert part in text
