"""The rules: exact counts, determinism, ties by id, and each rule against its definition."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darel_hf.selection.rules import RULES, Samples, kept_count, length_corrected, length_strata

DRAWN = {"random", "percentile", "stratified", "infobatch", *(name for name in RULES if name.startswith("loss_bins"))}


def samples(losses, **more):
    losses = np.asarray(losses, float)
    return Samples(np.arange(len(losses)), losses, **{k: np.asarray(v) for k, v in more.items()})


def rng(seed=0):
    return np.random.default_rng(seed)


@st.composite
def any_samples(draw):
    n = draw(st.integers(1, 60))
    floats = st.floats(-1e6, 1e6, allow_nan=False)
    losses = draw(st.lists(floats, min_size=n, max_size=n))
    ids = draw(st.lists(st.integers(-(2**40), 2**40), min_size=n, max_size=n, unique=True))
    lengths = draw(st.lists(st.integers(1, 50), min_size=n, max_size=n))
    correct = draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    embeddings = np.stack([np.sign(losses), lengths, correct], axis=1)
    reference = np.array(draw(st.lists(floats, min_size=n, max_size=n)))
    return Samples(np.array(ids), np.array(losses), np.array(lengths), None, np.array(correct), embeddings, reference)


@pytest.mark.parametrize("name", sorted(RULES))
@given(made=any_samples(), keep=st.floats(0.01, 1.0), seed=st.integers(0, 5), corrected=st.booleans())
@settings(max_examples=60, deadline=None)
def test_invariants(name, made, keep, seed, corrected):
    made = length_corrected(made) if corrected else made
    positions, weights = RULES[name](made, keep, rng(seed))
    assert len(positions) == max(1, round(keep * len(made)))
    assert np.array_equal(positions, np.unique(positions))
    assert positions.min() >= 0 and positions.max() < len(made)
    again, _ = RULES[name](made, keep, rng(seed))
    np.testing.assert_array_equal(positions, again)
    if weights is not None:
        assert weights.shape == positions.shape and np.all(weights >= 1)
        assert weights.sum() == pytest.approx(len(made))  # what is kept stands for all


@pytest.mark.parametrize("name", sorted(set(RULES) - {"infobatch"}))
@given(made=any_samples(), groups=st.integers(1, 8), keep=st.floats(0.2, 1.0))
@settings(max_examples=40, deadline=None)
def test_groups_stay_represented_in_proportion(name, made, groups, keep):
    made = replace(made, groups=np.arange(len(made)) % groups)
    present = len(np.unique(made.groups))
    if kept_count(keep, len(made)) < present:
        with pytest.raises(ValueError, match="groups cannot all be represented"):
            RULES[name](made, keep, rng())
        return
    positions, _ = RULES[name](made, keep, rng())
    assert len(positions) == kept_count(keep, len(made))
    kept = np.bincount(made.groups[positions], minlength=present)
    sizes = np.bincount(made.groups)
    assert kept.min() >= 1 and np.all(kept <= sizes)
    assert kept.max() - kept.min() <= 2  # the groups differ by at most one in size


@pytest.mark.parametrize("name", sorted(set(RULES) - DRAWN))
@given(made=any_samples(), keep=st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_order_of_samples_does_not_matter(name, made, keep):
    shuffle = rng(3).permutation(len(made))
    other = replace(
        made,
        ids=made.ids[shuffle],
        losses=made.losses[shuffle],
        lengths=made.lengths[shuffle],
        correct=made.correct[shuffle],
        embeddings=made.embeddings[shuffle],
        reference=made.reference[shuffle],
    )
    left, right = (set(s.ids[RULES[name](s, keep, rng())[0]]) for s in (made, other))
    assert left == right


def test_ids_keeps_what_lies_around_the_prototypes(monkeypatch):
    monkeypatch.setattr("darel_hf.selection.rules.CLUSTERS", 2)
    draw = rng()
    # Two classes with two well separated clusters each; the first ten of every cluster are near its centre.
    centres = np.repeat([[0, 0], [9, 0], [0, 9], [9, 9]], 20, axis=0)
    spread = np.tile(np.repeat([0.1, 1.0], 10), 4)
    points = centres + spread[:, None] * np.sign(draw.normal(size=(80, 2)))
    made = Samples(np.arange(80), np.zeros(80), groups=np.repeat([0, 1], 40), embeddings=points)
    kept, _ = RULES["ids"](made, 0.5, rng())
    assert np.bincount(made.groups[kept]).tolist() == [20, 20]
    assert np.all(spread[kept] == 0.1)
    with pytest.raises(ValueError, match="embeddings"):
        RULES["ids"](replace(made, embeddings=None), 0.5, rng())


def test_hardest_easiest_middle():
    made = samples([5, 1, 4, 2, 3])
    assert RULES["hardest"](made, 0.4, rng())[0].tolist() == [0, 2]
    assert RULES["adonis"](made, 0.4, rng())[0].tolist() == [0, 2]
    assert RULES["easiest"](made, 0.4, rng())[0].tolist() == [1, 3]
    assert RULES["middle"](made, 0.6, rng())[0].tolist() == [2, 3, 4]


def test_ties_go_to_the_smaller_id():
    made = Samples(np.array([9, 3, 7, 1]), np.zeros(4))
    for name in ("hardest", "easiest"):
        assert RULES[name](made, 0.5, rng())[0].tolist() == [1, 3]


def test_trimmed_cuts_the_top_and_takes_the_next():
    losses = rng().permutation(100)
    positions, _ = RULES["trimmed"](samples(losses), 0.5, rng())
    assert sorted(losses[positions]) == list(range(47, 97))
    positions, _ = RULES["trimmed"](samples(losses), 0.98, rng())  # all but two: the least extreme come back
    assert sorted(losses[positions]) == list(range(0, 98))


def test_stratified_takes_the_same_from_each_tenth():
    losses = rng().permutation(200)
    positions, _ = RULES["stratified"](samples(losses), 0.3, rng())
    assert np.bincount(losses[positions] // 20).tolist() == [6] * 10


def test_random_ignores_losses_even_nan():
    one, _ = RULES["random"](samples([np.nan] * 10), 0.5, rng(1))
    two, _ = RULES["random"](samples(range(10)), 0.5, rng(1))
    np.testing.assert_array_equal(one, two)


def test_percentile_probability_grows_with_the_loss():
    made, counts = samples(np.arange(10)), np.zeros(10)
    for seed in range(4000):
        counts[RULES["percentile"](made, 0.1, rng(seed))[0]] += 1
    expected = np.arange(1, 11) / 55  # one draw: proportional to the percentile
    np.testing.assert_allclose(counts / 4000, expected, atol=0.03)


def test_infobatch_keeps_above_mean_losses_and_is_unbiased():
    losses = rng().exponential(size=200)
    made, total = samples(losses), []
    for seed in range(600):
        positions, weights = RULES["infobatch"](made, 0.7, rng(seed))
        assert set(np.flatnonzero(losses >= losses.mean())) <= set(positions)
        total.append((losses[positions] * weights).sum())
    assert np.mean(total) == pytest.approx(losses.sum(), rel=0.01)


def test_kakurenbo_hides_easy_and_right():
    made = samples([1, 2, 3, 4], correct=[0.0, 1.0, 1.0, 1.0])
    assert RULES["kakurenbo"](made, 0.5, rng())[0].tolist() == [0, 3]
    with pytest.raises(ValueError, match="needs it"):
        RULES["kakurenbo"](samples([1, 2]), 0.5, rng())


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"sample ids \[1, 3\]"):
        RULES["hardest"](samples([1, np.nan, 2, np.inf]), 0.5, rng())
    with pytest.raises(ValueError, match="keep=0"):
        RULES["hardest"](samples([1]), 0, rng())
    with pytest.raises(ValueError, match="do not work with groups"):
        RULES["infobatch"](samples([1, 2], groups=[0, 1]), 1.0, rng())


def test_length_correction_compares_like_with_like():
    """Short samples have losses ten times as high; corrected, the same share of short and long is kept."""
    lengths = np.repeat([5, 50], 200)
    losses = rng().random(400) * np.where(lengths == 5, 10, 1)
    made = samples(losses, lengths=lengths)
    plain = lengths[RULES["hardest"](made, 0.25, rng())[0]]
    corrected = lengths[RULES["hardest"](length_corrected(made), 0.25, rng())[0]]
    assert (plain == 5).sum() == 100
    assert (corrected == 5).sum() == 50


def test_length_correction_keeps_the_order_where_lengths_are_equal():
    made = length_corrected(samples([3.0, 1.0, 2.0], lengths=[4, 4, 4]))
    assert np.argsort(made.losses).tolist() == [1, 2, 0]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=500))
@settings(max_examples=50, deadline=None)
def test_strata_are_ordered_by_length_and_equal_lengths_stay_together(lengths):
    lengths = np.array(lengths)
    strata = length_strata(lengths)
    order = np.argsort(lengths, kind="stable")
    assert np.all(np.diff(strata[order]) >= 0)
    assert all(len(set(strata[lengths == length])) == 1 for length in set(lengths.tolist()))
    assert strata.max() < 32


def test_rho_loss_keeps_what_a_reference_model_knows_better():
    made = samples([5.0, 4.0, 1.0, 3.0], reference=[4.9, 1.0, 0.9, 1.5])  # differences 0.1, 3, 0.1, 1.5
    assert RULES["rho_loss"](made, 0.5, rng())[0].tolist() == [1, 3]
    with pytest.raises(ValueError, match="reference"):
        RULES["rho_loss"](samples([1, 2]), 0.5, rng())


@given(made=any_samples())
@settings(max_examples=40, deadline=None)
def test_rho_loss_with_length_correction_ranks_differences(made):
    corrected = length_corrected(made)
    assert np.all(corrected.reference == 0) or len(made) < 2
    strata = length_strata(made.lengths)
    difference, place = made.losses - made.reference, corrected.losses
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        if len(made) > 1:
            assert np.all(np.diff(difference[members][np.argsort(place[members])]) >= 0)


@pytest.mark.parametrize(("name", "focus"), [("loss_bins_low", 0), ("loss_bins_medium", 1), ("loss_bins_high", 2)])
def test_loss_bins_draw_one_bin_five_times_as_often(name, focus):
    """Of a single draw from 300 samples the probabilities are known: 5 / 7 for the bin in focus, 1 / 7 for others."""
    made = samples(rng(1).permutation(300))
    draws = [RULES[name](made, 1 / 300, rng(seed))[0][0] for seed in range(3000)]
    bins = np.bincount(made.losses[draws].astype(int) // 100, minlength=3) / len(draws)
    expected = np.where(np.arange(3) == focus, 5 / 7, 1 / 7)
    np.testing.assert_allclose(bins, expected, atol=0.03)  # three standard errors
