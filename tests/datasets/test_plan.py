"""Test that the batch plan depends on (ids, seed, global batch) only, not on worker count or call order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.plan import BatchPlan
from dreamfleet.datasets.rng import key, numpy_rng
from dreamfleet.datasets.shard_order import shard_numbers


def test_key_is_stable_and_distinguishes_parts() -> None:
    # Users rely on this value: another hash would change the batches and noise of every run.
    assert key("noise", 1, "ab") == 7845550034051038017
    assert key(1) != key("1")
    assert key("a", "bc") != key("ab", "c")
    assert 0 <= key("x") < 2**63


@given(
    images=st.integers(1, 9),
    seed=st.integers(0, 5),
    batch=st.integers(1, 4),
    units=st.integers(1, 6),
    step=st.integers(0, 40),
)
def test_units_together_have_the_samples_of_a_step(
    images: int, seed: int, batch: int, units: int, step: int
) -> None:
    plan = BatchPlan([0] * images, seed=seed, global_batch=batch * units)
    whole = plan.draws(step)
    parts = [draw for unit in range(units) for draw in plan.draws(step, unit=unit, num_units=units)]
    assert parts == whole


def test_every_epoch_has_all_repeats_in_a_new_order() -> None:
    plan = BatchPlan([0] * 5, seed=3, global_batch=1, repeats=[1, 1, 2, 1, 3])
    epochs = [[plan.draws(step)[0] for step in range(e * 8, e * 8 + 8)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert Counter(draw.row for draw in epoch) == {0: 1, 1: 1, 2: 2, 3: 1, 4: 3}
        assert {draw.epoch for draw in epoch if draw.row == 4} == {
            3 * number,
            3 * number + 1,
            3 * number + 2,
        }
    assert len({tuple(draw.row for draw in epoch) for epoch in epochs}) == 3


def test_noise_keys_never_repeat() -> None:
    plan = BatchPlan([0] * 3, seed=0, global_batch=2, repeats=[1, 2, 1])
    draws = [draw for step in range(50) for draw in plan.draws(step)]
    assert len(draws) == len(set(draws))


@given(batch=st.integers(1, 6), step=st.integers(0, 30), seed=st.integers(0, 3))
def test_class_partners_have_the_concept_of_their_instance(batch: int, step: int, seed: int) -> None:
    concepts, classes = [0, 1, 0, 1, 1], [1, 0, 0, 1, 0, 0, 1]
    plan = BatchPlan(concepts, seed=seed, global_batch=batch, class_concepts=classes)
    draws, partners = plan.draws(step), plan.class_draws(step)
    assert [concepts[d.row] for d in draws] == [classes[p.row] for p in partners]


def test_every_class_image_is_used_before_any_is_reused() -> None:
    plan = BatchPlan([0, 0, 0], seed=1, global_batch=2, class_concepts=[0] * 8)
    used = [draw for step in range(8) for draw in plan.class_draws(step)]
    assert Counter(draw.row for draw in used) == dict.fromkeys(range(8), 2)
    assert [draw.epoch for draw in used] == [0] * 8 + [1] * 8


def test_missing_class_images_and_empty_sets_are_refused() -> None:
    with pytest.raises(DataError, match=r"concept 1 .*class"):
        BatchPlan([0, 1], seed=0, global_batch=1, class_concepts=[0, 0])
    with pytest.raises(DataError, match="no training"):
        BatchPlan([], seed=0, global_batch=1)


@st.composite
def bucketed(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Draw the bucket and the number of repeats of each of one to twelve images."""
    size = draw(st.integers(1, 12))
    each = st.lists(st.integers(0, 3), min_size=size, max_size=size)
    return draw(each), [1 + more for more in draw(each)]


@given(images=bucketed(), seed=st.integers(0, 3), batch=st.integers(1, 7), step=st.integers(0, 60))
def test_a_batch_has_one_bucket_for_any_number_of_workers(
    images: tuple[list[int], list[int]], seed: int, batch: int, step: int
) -> None:
    buckets, repeats = images
    plan = BatchPlan([0] * len(buckets), seed=seed, global_batch=batch * 6, repeats=repeats, buckets=buckets)
    whole = plan.draws(step)
    assert len(whole) == batch * 6 and len({buckets[draw.row] for draw in whole}) == 1
    for units in (1, 3, 6):
        parts = [draw for unit in range(units) for draw in plan.draws(step, unit=unit, num_units=units)]
        assert parts == whole


@given(images=bucketed(), seed=st.integers(0, 3), batch=st.integers(1, 20), epochs=st.integers(1, 6))
def test_buckets_progress_evenly(
    images: tuple[list[int], list[int]], seed: int, batch: int, epochs: int
) -> None:
    buckets, repeats = images
    plan = BatchPlan([0] * len(buckets), seed=seed, global_batch=batch, repeats=repeats, buckets=buckets)
    draws = [draw for step in range(plan.steps_in(epochs)) for draw in plan.draws(step)]
    assert len(draws) == len(set(draws))  # no noise key is used twice
    used = Counter(draw.row for draw in draws)
    assert all(used[row] >= epochs * count for row, count in enumerate(repeats))
    for bucket in set(buckets):
        rows = [row for row, home in enumerate(buckets) if home == bucket]
        due = epochs * sum(repeats[row] for row in rows)
        assert due <= sum(used[row] for row in rows) < due + batch


@given(seed=st.integers(0, 3), batch=st.integers(1, 9), step=st.integers(0, 50), images=st.integers(1, 6))
def test_one_bucket_is_the_plan_without_buckets(seed: int, batch: int, step: int, images: int) -> None:
    options = {"seed": seed, "global_batch": batch, "repeats": [1 + row % 2 for row in range(images)]}
    plain = BatchPlan([0] * images, **options)
    assert BatchPlan([0] * images, buckets=[5] * images, **options).draws(step) == plain.draws(step)


def test_the_order_of_buckets_changes_every_epoch() -> None:
    buckets = [0] * 8 + [1] * 4
    plan = BatchPlan([0] * 12, seed=0, global_batch=2, buckets=buckets)
    assert plan.steps_in(1) == 6
    epochs = [tuple(buckets[plan.draws(step)[0].row] for step in range(e * 6, e * 6 + 6)) for e in range(8)]
    assert all(Counter(epoch) == {0: 4, 1: 2} for epoch in epochs)
    assert len(set(epochs)) > 3


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 5), (0.5, 2), (0.1, 1), (4, 10)])
def test_steps_in_epochs(epochs: float, steps: int) -> None:
    assert BatchPlan([0] * 5, seed=0, global_batch=2).steps_in(epochs) == steps


def test_keyed_rng_does_not_depend_on_earlier_draws() -> None:
    first = numpy_rng("crop", 1).random(3)
    numpy_rng("crop", 2).random(100)
    assert (numpy_rng("crop", 1).random(3) == first).all()


def sharded_plan(window: int, *, seed: int = 0) -> BatchPlan:
    return BatchPlan(
        [0] * 4000,
        seed=seed,
        global_batch=8,
        shards=[row // 100 for row in range(4000)],
        shuffle_window=window,
    )


def test_a_sharded_epoch_uses_every_image_once_and_few_shards_at_a_time():
    for window in (1, 200, 1000):
        plan = sharded_plan(window)
        for epoch in range(2):
            rows = [draw.row for step in range(500 * epoch, 500 * (epoch + 1)) for draw in plan.draws(step)]
            assert sorted(rows) == list(range(4000))
            places: dict[int, list[int]] = {}
            for place, row in enumerate(rows):
                places.setdefault(row // 100, []).append(place)
            spans = [max(found) - min(found) for found in places.values()]
            assert max(spans) <= 100 + 2 * window
            mixed = [len({row // 100 for row in rows[at : at + 200]}) for at in range(0, 4000, 200)]
            assert max(mixed) <= (200 + 2 * window) // 100 + 2
            assert window == 1 or sum(mixed) / len(mixed) > window / 100  # the shards are mixed


def test_sharded_epochs_differ_and_resume_anywhere():
    first, again = sharded_plan(300), sharded_plan(300)
    steps = [3, 499, 500, 777]
    expected = {step: first.draws(step) for step in sorted(steps)}
    assert all(again.draws(step) == expected[step] for step in reversed(steps))
    assert again.draws(3, unit=1, num_units=4) == expected[3][2:4]
    assert [draw.row for draw in first.draws(0)] != [draw.row for draw in first.draws(500)]
    assert first.draws(0) != sharded_plan(300, seed=1).draws(0)


def test_images_of_one_file_have_one_shard_number():
    uris = [
        "tar://s3://b/0.tar#512-900",
        "s3://b/x.jpg",
        "tar://s3://b/1.tar#0-9",
        "edited://0,0,5,5/tar://s3://b/0.tar#0-9",
    ]
    numbers = shard_numbers(uris).tolist()
    assert numbers[0] == numbers[3] and len(set(numbers)) == 3


@given(
    fraction=st.floats(0.05, 0.95),
    images=st.integers(3, 12),
    batch=st.integers(1, 4),
    bucketed=st.booleans(),
)
def test_fractions_of_repeats_are_shared_equally_and_never_repeat_a_draw(
    fraction: float, images: int, batch: int, bucketed: bool
) -> None:
    repeats = [1 + fraction] * images + [2.0] * 3
    concepts = [0] * images + [1] * 3
    buckets = [row % 2 for row in range(images + 3)] if bucketed else None
    plan = BatchPlan(concepts, seed=1, global_batch=batch, repeats=repeats, buckets=buckets)
    draws = [draw for step in range(plan.steps_in(12)) for draw in plan.draws(step)]
    assert len(draws) == len(set(draws))
    uses = Counter(draw.row for draw in draws)
    for row in range(images + 3):
        assert sorted(draw.epoch for draw in draws if draw.row == row)[0] == 0
        # A group of n rows has round(f * n) further uses per epoch; a batch may end inside an epoch.
        assert 12 * (repeats[row] - 1 / 2) - 1 <= uses[row] <= 12 * (repeats[row] + 1 / 2) + 2 * batch
    alike = [uses[row] for row in range(0, images, 2)]
    assert max(alike) - min(alike) <= 2


def test_whole_repeats_are_the_same_as_a_number_with_no_fraction() -> None:
    one = BatchPlan([0] * 4, seed=7, global_batch=2, repeats=[1, 2, 1, 3])
    other = BatchPlan([0] * 4, seed=7, global_batch=2, repeats=[1.0, 2.0, 1.0, 3.0])
    assert [one.draws(step) for step in range(20)] == [other.draws(step) for step in range(20)]
