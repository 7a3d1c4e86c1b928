# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Group advantages, and Latent-GRPO's remedies for them (arXiv 2604.27998): pure functions of groups."""

import torch


INVALID_MODES = ("include", "exclude")


def group_advantages(
    rewards: torch.Tensor,
    is_valid: torch.Tensor | None = None,
    invalid: str = "exclude",
    scale: bool = True,
    eps: float = 1e-4,
) -> torch.Tensor:
    """
    Group-relative advantages (R - mean) / (std + ε), with invalid samples masked.

    A sample is invalid if its thinking never ended before the cap; a wrong answer is valid. Samples without a reward
    (`NaN`) are outside the group and have advantage 0.

    Args:
        rewards (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Rewards.
        is_valid (`torch.Tensor` of shape `(num_groups, num_generations)`, *optional*):
            Which samples are valid. If `None`, all.
        invalid (`str`, *optional*, defaults to `"exclude"`):
            `"include"`: invalid samples count in mean and standard deviation, and have advantage 0. `"exclude"`: they do
            not count either; with fewer than two valid ones the mean is taken as 0 and the standard deviation as 1.
        scale (`bool`, *optional*, defaults to `True`):
            Whether to divide by the standard deviation.
        eps (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviation.

    Returns:
        `torch.Tensor` of shape `(num_groups, num_generations)`.
    """
    if invalid not in INVALID_MODES:
        raise ValueError(f"`invalid` must be one of {', '.join(INVALID_MODES)}, got {invalid!r}.")
    has_reward = ~rewards.isnan()
    is_valid = has_reward if is_valid is None else is_valid & has_reward
    counted = is_valid if invalid == "exclude" else has_reward
    number = counted.sum(1, keepdim=True)
    known = rewards.masked_fill(~counted, 0.0)
    mean = known.sum(1, keepdim=True) / number.clamp(min=1)
    squares = (known - mean).masked_fill(~counted, 0.0).square().sum(1, keepdim=True)
    std = (squares / (number - 1).clamp(min=1)).sqrt()
    if invalid == "exclude":
        is_lone = number < 2
        mean, std = mean.masked_fill(is_lone, 0.0), std.masked_fill(is_lone, 1.0 - eps)
    advantages = rewards.nan_to_num() - mean
    return (advantages / (std + eps) if scale else advantages).masked_fill(~is_valid, 0.0)


def select_first_latent(
    advantages: torch.Tensor, old_log_probs: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Optimal correct-path first-latent selection: in a group with a positive advantage, only its most likely positive
    sample keeps an advantage at the first latent position. Samples of a group share the question, so their first latents
    would be pulled in as many directions as there are samples.

    Args:
        advantages (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Advantages.
        old_log_probs (`torch.Tensor` of shape `(num_groups, num_generations, num_positions)`):
            Log-probabilities under the policy that sampled; their mean over positions says which is most likely. Of equal
            ones the first wins.
        mask (`torch.Tensor` of shape `(num_groups, num_generations, num_positions)`, *optional*):
            0 at positions that are not there.

    Returns:
        `torch.Tensor` of shape `(num_groups, num_generations, num_positions)`: advantages of each position.
    """
    mask = torch.ones_like(old_log_probs) if mask is None else mask.to(old_log_probs.dtype)
    likelihood = (old_log_probs * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    is_positive = advantages > 0
    winner = likelihood.masked_fill(~is_positive, -torch.inf).argmax(1, keepdim=True)
    keeps_first = torch.zeros_like(is_positive).scatter(1, winner, True) | ~is_positive.any(1, keepdim=True)
    of_positions = advantages.unsqueeze(-1).repeat(1, 1, old_log_probs.size(-1))
    of_positions[..., 0] *= keeps_first
    return of_positions * mask
