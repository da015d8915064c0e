"""Learning rate and curriculum."""

import random

import pytest

from train.schedule import Curriculum, learning_rate


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step / 100, peak=1.0, warmup=0.1, final=0.05) for step in range(101)]
    assert rates[10] == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)
    assert all(rate > 0 for rate in rates)


def test_a_learned_stage_ends_before_its_deadline():
    curriculum = Curriculum((64, 128), (0.5,))
    for _ in range(100):
        curriculum.observe(64, 1.0, 0.1)
    assert curriculum.stage == 1


def test_a_stage_that_is_not_learned_ends_at_its_deadline():
    curriculum = Curriculum((64, 128), (0.5,))
    curriculum.observe(64, 0.1, 0.49)
    assert curriculum.stage == 0
    curriculum.observe(64, 0.1, 0.51)
    assert curriculum.stage == 1
    curriculum.observe(128, 0.1, 1.0)
    assert curriculum.stage == 1


def test_results_at_other_lengths_do_not_count():
    curriculum = Curriculum((64, 128, 256), (0.5, 0.9), stage=1)
    for _ in range(100):
        curriculum.observe(64, 1.0, 0.1)
    assert curriculum.stage == 1


def test_later_stages_review_shorter_lengths():
    rng = random.Random(0)
    curriculum = Curriculum((64, 128, 256), (0.5, 0.9))
    assert {curriculum.pick(rng) for _ in range(20)} == {64}
    curriculum.stage = 2
    picks = [curriculum.pick(rng) for _ in range(300)]
    assert set(picks) == {64, 128, 256}
    assert picks.count(256) > 150


def test_deadlines_must_match_the_lengths():
    with pytest.raises(ValueError, match="one entry fewer"):
        Curriculum((64, 128), ())
