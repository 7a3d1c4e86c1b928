# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Contrastive losses over the latent trajectories of one question (equation 8 and its stated alternatives), log-ratios."""

import torch
import torch.nn.functional as F


CONTRASTIVE_SIMILARITIES = ("dot", "cosine", "infonce", "margin")
# A clipped ratio says nothing beyond this, and exp() of the sum over many dimensions would overflow
MAX_LOG_RATIO = 20.0


def clamp_log_ratio(logps: torch.Tensor, old_logps: torch.Tensor) -> torch.Tensor:
    """Log-densities of latents that differ from the old ones by 20 nats at most, shape as `logps`."""
    return old_logps + (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def contrastive_loss(
    latents: torch.Tensor,
    means: torch.Tensor,
    group_latents: torch.Tensor,
    group_means: torch.Tensor,
    member_index: torch.Tensor,
    similarity: str = "dot",
    temperature: float = 0.1,
    margin: float = 0.5,
) -> torch.Tensor:
    r"""
    Contrastive loss of a question's group, seen from each of its trajectories in turn.

    Equation 8 of [DeepLatent Reasoning](https://huggingface.co/papers/2601.17275) is
    \( \mathcal{L}_{cl} = -\sum_k \log \mathrm{softmax}_j(s(z^k, z^j))[k] \) over the G trajectories of one question.
    A trajectory is the concatenation of its latent steps. Since a micro-batch rarely holds a whole group, row `i` puts
    its own differentiable trajectory in place `member_index[i]` of its group and takes the other members as constants:
    summed over the rows of a group, the gradient is exactly that of equation 8, however the group was split.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, num_latents, latent_dim)`):
            Reparameterized latents, differentiable.
        means (`torch.Tensor` of shape `(batch_size, num_latents, latent_dim)`):
            Means that the latents were drawn around, differentiable.
        group_latents (`torch.Tensor` of shape `(batch_size, group_size, num_latents, latent_dim)`):
            Stored latents of each row's whole group, the row itself included.
        group_means (`torch.Tensor` of shape `(batch_size, group_size, num_latents, latent_dim)`):
            Stored means of each row's whole group.
        member_index (`torch.Tensor` of shape `(batch_size,)`):
            Place of each row in its group.
        similarity (`str`, *optional*, defaults to `"dot"`):
            - `"dot"`: equation 8 as printed, s is the dot product of the trajectories.
            - `"cosine"`: equation 8 with s = cosine / `temperature`.
            - `"infonce"`: the positive of a trajectory is its own mean trajectory (the noise-free view of it), the
              negatives are the other members; cosine / `temperature`. The choice of the positive is ours.
            - `"margin"`: hinge, the mean over the other members of max(0, cosine - `margin`).
        temperature (`float`, *optional*, defaults to `0.1`):
            Temperature of `"cosine"` and `"infonce"`.
        margin (`float`, *optional*, defaults to `0.5`):
            Cosine below which `"margin"` is satisfied.

    Returns:
        `torch.Tensor` of shape `(batch_size, group_size)`:
            Terms of the group's loss with the row's own trajectory live; term `member_index` is the row's own.
    """
    group_size = group_latents.size(1)
    is_live = F.one_hot(member_index, group_size).bool()[..., None]

    def trajectories(live: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        merged = torch.where(is_live, live.float().flatten(1)[:, None], stored.detach().float().flatten(2))
        return merged if similarity == "dot" else F.normalize(merged, dim=-1)

    samples = trajectories(latents, group_latents)  # (B, G, T * d)
    with torch.autocast(samples.device.type, enabled=False):
        scores = samples @ samples.transpose(1, 2)  # (B, G, G)
    is_self = torch.eye(group_size, dtype=torch.bool, device=scores.device)
    if similarity == "margin":
        return (scores - margin).clamp(min=0).masked_fill(is_self, 0).sum(-1) / max(group_size - 1, 1)
    if similarity == "infonce":
        positives = (samples * trajectories(means, group_means)).sum(-1)
        scores = torch.where(is_self, positives[..., None], scores)
    if similarity != "dot":
        scores = scores / temperature
    return -scores.log_softmax(-1).diagonal(dim1=1, dim2=2)
