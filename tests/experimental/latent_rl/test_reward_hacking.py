# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest
from accelerate import PartialState
from transformers import TrainerControl, TrainerState

from trl_dlr.experimental.latent_rl.latent_rl_trainer import RewardHackingCallback


BEFORE = [(0.3, 0.5), (0.5, 0.7), (0.4, 0.6)]


def callback_after(since, before=BEFORE, window=3, threshold=0.1):
    callback = RewardHackingCallback(window, threshold)
    for rollouts, has_moved in ((before, False), (since, True)):
        for score, accuracy in rollouts:
            callback.add(score, accuracy, has_moved)
    return callback


@pytest.mark.parametrize(
    ("since", "stops"),
    [
        ([(0.7, 0.6)] * 3, True),  # up, and the same
        ([(0.7, 0.3)] * 3, True),  # up, and down
        ([(0.7, 0.7)] * 3, False),  # both up
        ([(0.45, 0.3)] * 3, False),  # up by less than the threshold
        ([(0.2, 0.3)] * 3, False),  # both down
        ([(0.9, 0.1)] * 2, False),  # too few to tell
        ([(0.2, 0.9)] * 9 + [(0.9, 0.1)] * 3, True),  # the latest count
        ([(0.9, 0.1)] * 9 + [(0.5, 0.7)] * 3, False),
    ],
)
def test_it_stops_where_the_score_rises_and_accuracy_does_not(since, stops):
    PartialState()  # as any trainer has
    callback = callback_after(since)
    control = TrainerControl()
    callback.on_step_end(None, TrainerState(), control)
    assert callback.is_hacking == control.should_training_stop == control.should_save == stops


def test_rises_are_differences_of_means_over_the_window():
    # The first rollout before the first update is out of the window
    callback = callback_after([(0.5, 0.4), (0.7, 0.5), (0.9, 0.6)], before=[(9.0, 9.0), *BEFORE])
    assert callback.rises == pytest.approx((0.3, -0.1))
    assert callback_after([(0.5, 0.4)] * 3, before=[]).rises is None


def test_what_it_knows_goes_through_a_checkpoint():
    for since in ([], [(0.7, 0.5)] * 2, [(0.7, 0.5)] * 5):
        callback, loaded = callback_after(since), RewardHackingCallback(3, 0.1)
        loaded.load_state_tensors(callback.state_tensors())
        assert (loaded.before, loaded.since, loaded.rises) == (callback.before, callback.since, callback.rises)
