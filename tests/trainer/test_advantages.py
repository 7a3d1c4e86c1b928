# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest
import torch

from trl_dlr.trainer.losses import group_advantages, select_first_latent


NAN = float("nan")


def test_without_invalid_samples_it_is_equation_4():
    rewards = torch.tensor([[1.0, -1.0, 0.5, 1.5], [2.0, 2.0, 2.0, 2.0]])
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    for invalid in ("include", "exclude"):
        torch.testing.assert_close(group_advantages(rewards, invalid=invalid), expected)
    assert torch.equal(group_advantages(rewards)[1], torch.zeros(4))


def test_include_keeps_invalid_samples_in_the_statistics():
    rewards = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    is_valid = torch.tensor([[True, True, False, False]])
    # mean 0 and std sqrt(4/3) of all four; the invalid ones have no advantage
    std = (4 / 3) ** 0.5 + 1e-4
    torch.testing.assert_close(
        group_advantages(rewards, is_valid, "include"), torch.tensor([[1 / std, -1 / std, 0.0, 0.0]])
    )


def test_exclude_takes_them_out():
    rewards = torch.tensor([[1.0, 0.0, -1.0, 5.0]])
    is_valid = torch.tensor([[True, True, False, False]])
    # mean 0.5 and std sqrt(0.5) of the first two
    value = 0.5 / (0.5**0.5 + 1e-4)
    torch.testing.assert_close(
        group_advantages(rewards, is_valid, "exclude"), torch.tensor([[value, -value, 0.0, 0.0]])
    )


@pytest.mark.parametrize("reward", [1.0, -1.0, 0.0])
def test_one_valid_sample_is_compared_with_zero(reward):
    rewards = torch.tensor([[reward, 1.0, -1.0]])
    is_valid = torch.tensor([[True, False, False]])
    torch.testing.assert_close(group_advantages(rewards, is_valid), torch.tensor([[reward, 0.0, 0.0]]))


def test_nothing_valid_teaches_nothing():
    rewards = torch.tensor([[1.0, -1.0], [NAN, NAN]])
    is_valid = torch.tensor([[False, False], [True, True]])
    for invalid in ("include", "exclude"):
        assert torch.equal(group_advantages(rewards, is_valid, invalid), torch.zeros(2, 2))


def test_samples_without_reward_are_outside_the_group():
    rewards = torch.tensor([[1.0, NAN, -1.0, NAN]])
    value = 1 / (2**0.5 + 1e-4)
    for invalid in ("include", "exclude"):
        torch.testing.assert_close(
            group_advantages(rewards, invalid=invalid), torch.tensor([[value, 0.0, -value, 0.0]])
        )


def test_only_the_likeliest_positive_sample_keeps_its_first_latent():
    advantages = torch.tensor([[1.0, 0.5, -1.0, -0.5]])
    old = torch.tensor([[[-3.0, -3.0], [-1.0, -2.0], [0.0, 0.0], [-9.0, -9.0]]])
    expected = torch.tensor([[[0.0, 1.0], [0.5, 0.5], [0.0, -1.0], [0.0, -0.5]]])
    assert torch.equal(select_first_latent(advantages, old), expected)


def test_a_sample_that_has_no_first_latent_takes_nobodys():
    advantages = torch.tensor([[1.0, 1.0, -2.0]])
    old = torch.tensor([[[-3.0, -3.0], [0.0, 0.0], [-1.0, -1.0]]])
    for of_the_likeliest in ([0, 0], [0, 1]):  # masked as a whole, or a thought that ended at once
        mask = torch.tensor([[[1, 1], of_the_likeliest, [1, 1]]])
        selected = select_first_latent(advantages, old, mask)
        assert selected[0, :, 0].tolist() == [1.0, 0.0, 0.0]
        assert torch.equal(selected[0, :, 1], advantages[0] * mask[0, :, 1])


def test_a_group_without_a_positive_sample_stays_as_it_is():
    advantages = torch.tensor([[0.0, -1.0]])
    old = torch.randn(1, 2, 3)
    assert torch.equal(select_first_latent(advantages, old), advantages.unsqueeze(-1).expand(1, 2, 3))


def test_of_equally_likely_samples_the_first_wins():
    advantages = torch.ones(1, 2)
    expected = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    assert torch.equal(select_first_latent(advantages, torch.zeros(1, 2, 2)), expected)


def test_likelihood_is_the_mean_over_the_positions_that_are_there():
    advantages = torch.ones(1, 2)
    old = torch.tensor([[[-2.0, -2.0, -2.0], [-3.0, 99.0, 99.0]]])
    mask = torch.tensor([[[1, 1, 1], [1, 0, 0]]])
    expected = torch.tensor([[[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]])
    assert torch.equal(select_first_latent(advantages, old, mask), expected)


def test_bad_input():
    with pytest.raises(ValueError, match="`invalid` must be one of include, exclude, got 'drop'"):
        group_advantages(torch.zeros(1, 2), invalid="drop")


def test_unscaled_advantages_are_differences_from_the_mean():
    rewards = torch.tensor([[1.0, 0.0, -1.0, 5.0]])
    is_valid = torch.tensor([[True, True, True, False]])
    assert torch.equal(group_advantages(rewards, is_valid, scale=False), torch.tensor([[1.0, 0.0, -1.0, 0.0]]))
