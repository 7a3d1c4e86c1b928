# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What reinforcement learning would start from: is there something to learn from, and does it reach the policy?"""

from collections.abc import Callable

import torch
from datasets import Dataset

from ..reasoners.latent_reasoner import LatentReasoner
from .controls import evaluate_latents


MIN_MIXED_GROUPS = 0.3  # share of groups with differing rewards below which there is little to learn from
CONTROLS = ("no_latents", "plain_anchors", "policy", "shuffled")


def preflight(
    reasoner: LatentReasoner,
    dataset: Dataset,
    correctness_reward: Callable[..., list[float]],
    format_reward: Callable[..., list[float]] | None = None,
    format_weight: float = 1.0,
    num_samples: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    found: dict[str, dict[str, float]] | None = None,
) -> dict[str, float]:
    """
    Metrics to read before a run of reinforcement learning.

    Args:
        reasoner ([`LatentReasoner`]):
            Policy and main model.
        dataset ([`~datasets.Dataset`]):
            Some training questions, with a column `"prompt"` and the columns that the rewards read.
        correctness_reward (`Callable`):
            Correctness reward, +1 or -1.
        format_reward (`Callable`, *optional*):
            Format reward, +1 or -1.
        format_weight (`float`, *optional*, defaults to `1.0`):
            Weight λ of the format reward in the total (equation 3).
        num_samples (`int`, *optional*, defaults to `8`):
            Trajectories per question; `num_generations` of the run to come.
        batch_size (`int`, *optional*, defaults to `8`):
            Questions decoded together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the trajectories.
        found (`dict[str, dict[str, float]]`, *optional*):
            Metrics of controls that [`evaluate_latents`] has measured already, which are not decoded again.

    Returns:
        `dict[str, float]`:
            - `<control>/<metric>` of [`evaluate_latents`] for `no_latents`, `plain_anchors`, the `policy` and
              `shuffled`. A policy that scores below the first two hurts; what it scores above the last is about its
              question.
            - `policy/mixed`: share of questions whose samples differ in reward, the only ones that teach anything.
            - `mean_size`: root mean square of μ/σ, see [`DiagonalGaussian.size`] and [`SoftTokens.size`]. Far above 1,
              samples of a question hardly differ.
            - `gradient/<part>`: norm of the policy gradient of random advantages in each part of the policy. It is 0
              in what reinforcement learning does not reach.
    """
    metrics = {}
    for control in CONTROLS:
        of_control = (found or {}).get(control) or evaluate_latents(
            reasoner,
            dataset,
            correctness_reward,
            format_reward,
            control=control,
            format_weight=format_weight,
            num_samples=num_samples,
            batch_size=batch_size,
            seed=seed,
            description=f"Preflight: {control}",
        )
        metrics |= {f"{control}/{metric}": value for metric, value in of_control.items()}
    policy, prompts = reasoner.policy, list(dataset["prompt"])[:batch_size]
    inputs = reasoner.tokenize(prompts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = policy.sample(**inputs)
        sizes = drawn.density.size().square().sum() / drawn.lengths.sum()
        metrics["mean_size"] = sizes.sqrt().item()
        advantages = torch.randn(len(prompts), 1, device=drawn.latents.device)
    named = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    density = policy(**inputs, latents=drawn.latents, lengths=drawn.lengths).density
    loss = (density.log_prob(drawn.latents) * advantages).mean()
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    for part in dict.fromkeys(name.split(".")[0] for name, _ in named):
        norms = [
            g.norm()
            for (name, _), g in zip(named, gradients, strict=True)
            if name.split(".")[0] == part and g is not None
        ]
        metrics[f"gradient/{part}"] = torch.stack(norms).norm().item() if norms else 0.0
    return metrics
