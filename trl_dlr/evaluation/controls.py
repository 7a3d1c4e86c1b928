# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Held-out figures of a policy, and of the controls that say what its latents do."""

from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from ..models.reasoner import LatentReasoner


LATENTS = ("none", "anchors", "own", "shuffled")


def evaluate_latents(
    reasoner: LatentReasoner,
    dataset: Dataset,
    correctness_reward: Callable[..., list[float]],
    format_reward: Callable[..., list[float]] | None = None,
    latents: str = "own",
    format_weight: float = 1.0,
    num_samples: int = 4,
    batch_size: int = 8,
    seed: int = 0,
    description: str = "Evaluation",
) -> dict[str, float]:
    """
    Figures of a policy on held-out questions. Every process takes its share of them.

    Args:
        reasoner ([`LatentReasoner`]):
            Policy and main model.
        dataset ([`~datasets.Dataset`]):
            Questions with a column `"prompt"` and the columns that the rewards read.
        correctness_reward (`Callable`):
            Correctness reward, +1 or -1.
        format_reward (`Callable`, *optional*):
            Format reward, +1 or -1. Without it, `format` is missing and `reward` is correctness alone.
        latents (`str`, *optional*, defaults to `"own"`):
            - `"own"`: each question gets `num_samples` trajectories sampled for it.
            - `"shuffled"`: each question gets those of another one. What this costs is what the latents carry about
              their question; what remains is steering.
            - `"none"`: the main model answers alone, once, greedily.
            - `"anchors"`: it is given as many plain tokens of the policy's anchor text instead, once.
        format_weight (`float`, *optional*, defaults to `1.0`):
            Weight λ of the format reward in the total (equation 3).
        num_samples (`int`, *optional*, defaults to `4`):
            Trajectories per question.
        batch_size (`int`, *optional*, defaults to `8`):
            Questions decoded together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the trajectories and of the shuffling.
        description (`str`, *optional*, defaults to `"Evaluation"`):
            Title of the progress bar.

    Returns:
        `dict[str, float]`: `reward` (total), `accuracy` and `format` (shares), averaged over questions and samples, and
        `pass_at_k`, the share of questions with a correct answer among their `num_samples`, and `mixed`, the share of
        those whose samples differ in reward.
    """
    if latents not in LATENTS:
        raise ValueError(f"`latents` must be one of {', '.join(LATENTS)}, got {latents!r}.")
    num_anchors = reasoner.policy.config.num_latents if latents == "anchors" else 0
    if latents in ("none", "anchors"):
        num_samples = 1
    state = PartialState()
    with state.split_between_processes(list(range(len(dataset)))) as places, torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = dataset.select(places)
        prompts = list(rows["prompt"])
        own = None
        if latents in ("own", "shuffled"):
            chunks = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
            own = torch.cat([reasoner.sample_latents(chunk, num_samples) for chunk in chunks])
            own = own.unflatten(0, (len(prompts), num_samples))
            if latents == "shuffled":
                order = torch.randperm(len(prompts))
                giver = torch.empty_like(order)
                giver[order] = order.roll(1)  # one cycle: nobody keeps its own
                own = own[giver]
        scores = []
        for start in tqdm(range(0, len(prompts), batch_size), description, disable=not state.is_main_process):
            batch = rows[start : start + batch_size]
            given = None if own is None else own[start : start + batch_size].flatten(0, 1)
            texts = reasoner.decode(batch["prompt"], given, num_anchors)
            repeated = {name: [v for v in values for _ in range(num_samples)] for name, values in batch.items()}
            prompts_of = repeated.pop("prompt")
            if not isinstance(prompts_of[0], str):
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            correct = correctness_reward(prompts=prompts_of, completions=texts, **repeated)
            formatted = [0.0] * len(correct)
            if format_reward is not None:
                formatted = format_reward(prompts=prompts_of, completions=texts, **repeated)
            scores += torch.tensor([correct, formatted]).T.unflatten(0, (-1, num_samples)).tolist()
    scores = torch.tensor(gather_object(scores))  # (questions, samples, 2)
    correct, formatted = scores.unbind(-1)
    rewards = correct + format_weight * formatted
    figures = {
        "reward": rewards.mean().item(),
        "accuracy": (correct > 0).float().mean().item(),
        "format": (formatted > 0).float().mean().item(),
        "pass_at_k": (correct > 0).any(dim=1).float().mean().item(),
        "mixed": (rewards.amax(1) > rewards.amin(1)).float().mean().item(),
    }
    if format_reward is None:
        del figures["format"]
    return figures
