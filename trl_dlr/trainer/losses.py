# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Group advantages and Latent-GRPO's changes to them (arXiv 2604.27998), contrastive losses over the latent trajectories
of one question (equation 8 and its stated alternatives), and log-ratios.
"""

import functools
from collections import deque
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import PreTrainedModel
from trl import GRPOConfig
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from ..models.densities import Density


CONTRASTIVE_SIMILARITIES = ("dot", "cosine", "infonce", "margin")
# A clipped ratio says nothing beyond this, and exp() of the sum over many dimensions would overflow
MAX_LOG_RATIO = 20.0


@dataclass
class Scoring:
    """
    What a loss asks of TRL's hook for log-probabilities, `_get_per_token_logps_and_entropies`, and what that has
    found. B rows are those of a micro-batch.

    Args:
        latents (`torch.Tensor` or `dict[str, torch.Tensor]`):
            Stored latents, `(B, T, ...)`.
        lengths (`torch.Tensor` of shape `(B,)`):
            Latents of each row, the first ones.
        old_logps (`torch.Tensor` of shape `(B, num_positions)`, *optional*):
            Scores at the time of the rollout. `None` if this pass finds them: nothing was updated since.
        is_needed (`torch.Tensor` of shape `(B,)`, *optional*):
            Rows that the loss needs; all, if not given.
        noise (`torch.Tensor` of shape `(B, T, d)`, *optional*):
            Noise by which latents are drawn anew from the density.
        logps (`torch.Tensor` of shape `(B, num_positions)`, *optional*):
            Scores that were found, detached.
        density ([`Density`], *optional*):
            Density of the latents that was found.
        latent_embeds (`torch.Tensor` of shape `(B, T, hidden_size)`, *optional*):
            Embeddings of the latents that were drawn anew.
    """

    latents: torch.Tensor | dict[str, torch.Tensor]
    lengths: torch.Tensor
    old_logps: torch.Tensor | None = None
    is_needed: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    logps: torch.Tensor | None = None
    density: Density | None = None
    latent_embeds: torch.Tensor | None = None

    @classmethod
    def of_loss(cls, inputs: dict[str, torch.Tensor], global_step: int, **kwargs) -> "Scoring":
        """
        That of a micro-batch. Without an update since the rollout its very score is the old one, whatever a batch of
        another shape would round it to, and [`keep`] leaves it in the buffered micro-batch for the passes to come.
        """
        if inputs["rollout_step"] == global_step:
            inputs["old_per_token_logps"] = None
        return cls(old_logps=inputs.get("old_per_token_logps"), **kwargs)

    def keep(self, inputs: dict[str, torch.Tensor]) -> None:
        if self.old_logps is None:
            inputs["old_per_token_logps"] = self.old_logps = self.logps


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
            `"include"`: invalid samples count in mean and standard deviation, and have advantage 0. `"exclude"`: they
            do not count either; with fewer than two valid ones the mean is taken as 0 and the standard deviation as 1.
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
    sample that has a first latent keeps an advantage there. Samples of a group share the question, so their first
    latents would be pulled in as many directions as there are samples.

    Args:
        advantages (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Advantages.
        old_log_probs (`torch.Tensor` of shape `(num_groups, num_generations, num_positions)`):
            Log-probabilities under the policy that sampled; their mean over positions says which is most likely. Of
            equal ones the first wins.
        mask (`torch.Tensor` of shape `(num_groups, num_generations, num_positions)`, *optional*):
            0 at positions that are not there.

    Returns:
        `torch.Tensor` of shape `(num_groups, num_generations, num_positions)`: advantages of each position.
    """
    mask = torch.ones_like(old_log_probs) if mask is None else mask.to(old_log_probs.dtype)
    likelihood = (old_log_probs * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    is_positive = (advantages > 0) & (mask[..., 0] > 0)
    winner = likelihood.masked_fill(~is_positive, -torch.inf).argmax(1, keepdim=True)
    keeps_first = torch.zeros_like(is_positive).scatter(1, winner, True) | ~is_positive.any(1, keepdim=True)
    of_positions = advantages.unsqueeze(-1).repeat(1, 1, old_log_probs.size(-1))
    of_positions[..., 0] *= keeps_first
    return of_positions * mask


def shape_advantages(
    output: dict[str, Any],
    args: GRPOConfig,
    accelerator: Accelerator,
    num_generations: int,
    rewards: torch.Tensor,
    is_valid: torch.Tensor,
    log_probs: torch.Tensor | None,
    mask: torch.Tensor,
    logged: deque,
    costs: torch.Tensor | None = None,
) -> None:
    """
    Change the advantages of a rollout as the configuration asks for.

    Args:
        output (`dict[str, Any]`):
            Rollout, of which `advantages` is changed, to shape `(num_rows, num_positions)` with
            `first_latent_selection`; `completion_advantages` are then those of whole completions.
        args ([`~trl.GRPOConfig`] with [`RemedyArguments`]):
            Configuration of the trainer.
        accelerator ([`~accelerate.Accelerator`]):
            What gathers the rows of all processes: groups may span them.
        num_generations (`int`):
            Size G of a group.
        rewards (`torch.Tensor` of shape `(num_processes * num_rows,)`):
            Total rewards of all processes' rows, NaN where there is none.
        is_valid (`torch.Tensor` of shape `(num_rows,)`):
            Rows that ended by themselves.
        log_probs (`torch.Tensor` of shape `(num_rows, num_positions)`, *optional*):
            Log-probabilities under the policy that sampled, needed for `first_latent_selection`.
        mask (`torch.Tensor` of shape `(num_rows, num_positions)`):
            0 at positions that are no actions.
        logged (`deque`):
            Advantages that are shown beside their completions, of which the latest are replaced.
        costs (`torch.Tensor` of shape `(num_rows,)`, *optional*):
            What is taken off each row's reward for its advantage.
    """

    def groups(of_process: torch.Tensor) -> torch.Tensor:
        if of_process.dim() > 1:  # completions of one process may be longer than those of another
            of_process = accelerator.pad_across_processes(of_process, dim=1)
        return accelerator.gather(of_process).unflatten(0, (-1, num_generations))

    def of_process(groups: torch.Tensor) -> torch.Tensor:
        return groups.flatten(0, 1).tensor_split(accelerator.num_processes)[accelerator.process_index]

    if args.invalid_samples != "keep" or costs is not None:
        keeps_all = args.invalid_samples == "keep"
        is_valid = None if keeps_all else groups(is_valid.to(accelerator.device))
        rewards = rewards.unflatten(0, (-1, num_generations))
        if costs is not None:
            rewards = rewards - groups(costs)
        invalid = "include" if keeps_all else args.invalid_samples
        advantages = group_advantages(rewards, is_valid, invalid, scale=args.scale_rewards == "group")
        output["advantages"] = of_process(advantages)
        for _ in range(min(len(logged), advantages.numel())):
            logged.pop()
        logged.extend(advantages.flatten().tolist())
    if args.first_latent_selection:
        output["completion_advantages"] = output["advantages"]
        selected = select_first_latent(groups(output["advantages"]), groups(log_probs), groups(mask))
        output["advantages"] = of_process(selected)[:, : mask.size(1)]


# Their logits are more, or less, of their hidden states than TRL's fused head makes of them
OWN_LOGITS = ("inkling_text", "llama4_text", "mllama_text_model", "modernbert-decoder", "mpt")


def add_likelihoods(main_model: PreTrainedModel, outputs: tuple[str, ...] = ("log_probs",)) -> None:
    """
    Let `main_model(..., labels=labels, fused_lm_head=True)` return likelihoods, without the logits of a whole
    vocabulary where TRL knows how.

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM, whose forward is patched in place.
        outputs (`tuple[str, ...]`, *optional*, defaults to `("log_probs",)`):
            As for TRL's `add_fused_lm_head`, of `"log_probs"`, `"entropy"` and `"is_top1"`.

    Raises:
        `ValueError`: if its layers are quantized in a way that gradients do not pass.
    """
    layer = main_model.get_output_embeddings()
    if not isinstance(layer.weight, torch.Tensor):
        raise ValueError(
            f"`main_model` has layers of type {type(layer).__module__}.{type(layer).__name__}, through which no "
            "gradient passes, and a supervised start and `hybrid_coef` need one. Take the plain model, or one that "
            "bitsandbytes has quantized."
        )
    if main_model.config.get_text_config().model_type not in OWN_LOGITS:
        add_fused_lm_head(main_model, outputs=outputs)
        return
    forward = main_model.forward

    @functools.wraps(type(main_model).forward)
    def forward_with_likelihoods(self, *args, fused_lm_head=False, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            return forward(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        logits = forward(*args, **{**kwargs, "use_cache": False}).logits[:, :-1].float()
        labels = labels.to(logits.device)
        is_target, every = labels != -100, logits.log_softmax(-1)
        log_probs = every.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~is_target, 0.0)
        num_items = is_target.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / num_items,
            log_probs=log_probs,
            entropy=-(every.exp() * every).sum(-1).detach().masked_fill(~is_target, 0.0),
            is_top1=(logits.argmax(-1) == labels) & is_target,
            label_mask=is_target,
        )

    main_model.forward = MethodType(forward_with_likelihoods, main_model)
