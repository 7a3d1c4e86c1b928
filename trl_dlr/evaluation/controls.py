# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Held-out metrics of a policy, and of the controls that say what its latents do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from ..models import LatentPolicyModel
from ..reasoners.latent_reasoner import LatentReasoner


logger = get_logger(__name__)


CONTROLS = ("policy", "mean_latents", "no_latents", "plain_anchors", "zero_latents", "fresh_head", "shuffled")
SAMPLED = ("policy", "fresh_head", "shuffled")


def answer_questions(
    reasoner: LatentReasoner,
    dataset: Dataset,
    control: str = "policy",
    num_samples: int = 4,
    batch_size: int = 8,
    seed: int = 0,
    description: str = "Evaluation",
) -> list[list[str]]:
    """
    Answers to questions with the latents of a policy, or with those of a control. Every process decodes its share of
    them.

    Args:
        reasoner ([`LatentReasoner`]):
            Policy and main model.
        dataset ([`~datasets.Dataset`]):
            Questions with a column `"prompt"`.
        control (`str`, *optional*, defaults to `"policy"`):
            - `"policy"`: each question gets `num_samples` trajectories sampled for it.
            - `"mean_latents"`: the mean of every step, once.
            - `"no_latents"`: the main model answers alone, once, greedily.
            - `"plain_anchors"`: it is given as many plain tokens of the policy's anchor text instead, once.
            - `"zero_latents"`: latents of 0, once. With `injection="anchors"`, they are the anchor tokens; soft tokens
              of 0 mix all tokens in equal parts.
            - `"fresh_head"`: trajectories of the same policy with a latent head that has not been trained, so mostly
              noise.
            - `"shuffled"`: each question gets those of another one. What this costs is what the latents carry about
              their question; what remains is steering.
        num_samples (`int`, *optional*, defaults to `4`):
            Trajectories per question, where they are sampled.
        batch_size (`int`, *optional*, defaults to `8`):
            Questions decoded together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the trajectories, of the shuffling and of a fresh head.
        description (`str`, *optional*, defaults to `"Evaluation"`):
            Title of the progress bar.

    Returns:
        `list[list[str]]`: answers of each question, in every process.
    """
    if control not in reasoner.controls:
        raise ValueError(f"`control` must be one of {', '.join(reasoner.controls)}, got {control!r}.")
    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        found = dataset.column_names if isinstance(dataset, Dataset) else type(dataset).__name__
        raise ValueError(
            f"`dataset` must be a `datasets.Dataset` with a column 'prompt', got {found}. `Dataset.from_list` makes "
            "one of a list of rows."
        )
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if len(dataset) == 0:
        raise ValueError("`dataset` must hold at least one question, and is empty.")
    if control == "shuffled" and len(dataset) < 2:
        raise ValueError("`dataset` must hold at least two questions for `shuffled`, which takes another's latents.")
    if control not in SAMPLED:
        num_samples = 1
    num_anchors = reasoner.policy.config.num_latents if control == "plain_anchors" else 0
    state, answers, prompts, latents = PartialState(), [], list(dataset["prompt"]), None
    before = reasoner.engine.num_truncated
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Every process draws the latents of all questions, which are cheap: answers do not depend on how many there
        # are
        if control == "zero_latents":
            drawn = reasoner.policy.zero_latents(len(prompts))
            latents, lengths = drawn.latents.unsqueeze(1), drawn.lengths.unsqueeze(1)
        elif control not in ("no_latents", "plain_anchors"):
            chunks = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
            with fresh_head(reasoner.policy) if control == "fresh_head" else nullcontext():
                drawn = [reasoner.sample_latents(chunk, num_samples, control == "mean_latents") for chunk in chunks]
            latents, lengths = (
                torch.cat(parts).unflatten(0, (len(prompts), num_samples)) for parts in zip(*drawn, strict=True)
            )
            if control == "shuffled":
                order = torch.randperm(len(prompts))
                giver = torch.empty_like(order)
                giver[order] = order.roll(1)  # one cycle: no question keeps its latents
                latents, lengths = latents[giver], lengths[giver]
        with state.split_between_processes(list(range(len(prompts)))) as indices:
            for start in tqdm(range(0, len(indices), batch_size), description, disable=not state.is_main_process):
                chunk = indices[start : start + batch_size]
                row_latents = () if latents is None else (latents[chunk].flatten(0, 1), lengths[chunk].flatten())
                texts = reasoner.decode([prompts[index] for index in chunk], *row_latents, num_anchors=num_anchors)
                answers += [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
    answers = gather_object(answers)
    if sum(gather_object([reasoner.engine.num_truncated - before])) == len(prompts) * num_samples:
        logger.warning(
            f"{description}: all {len(prompts) * num_samples} answers were cut off at "
            f"{reasoner.engine.max_new_tokens} tokens. If they are meant to end by themselves, raise `max_new_tokens` "
            "(in training, `max_completion_length`)."
        )
    return answers


@contextmanager
def fresh_head(policy: LatentPolicyModel) -> Iterator[None]:
    """A policy with a latent head that has not been trained, in place of its own for the while."""
    trained = policy.latent_head
    policy.latent_head = policy.untrained_head()
    try:
        yield
    finally:
        policy.latent_head = trained


def score_answers(dataset: Dataset, answers: list[list[str]], reward: Callable[..., list[float]]) -> torch.Tensor:
    """
    Reward of each answer. Every process takes its share of the questions.

    Args:
        dataset ([`~datasets.Dataset`]):
            Questions with a column `"prompt"` and the columns that the reward reads.
        answers (`list[list[str]]`):
            As many answers to each of them.
        reward (`Callable`):
            Reward function.

    Returns:
        `torch.Tensor` of shape `(num_questions, num_samples)`: rewards, in every process. NaN where the function
        returned `None`, which is to have no opinion.
    """
    num_samples = len(answers[0])
    with PartialState().split_between_processes(list(range(len(dataset)))) as indices:
        rows = dataset.select(indices)[:]
        repeated = {name: [v for v in values for _ in range(num_samples)] for name, values in rows.items()}
        prompts, texts = repeated.pop("prompt"), [text for index in indices for text in answers[index]]
        if prompts and not isinstance(prompts[0], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        rewards = reward(prompts=prompts, completions=texts, **repeated)
        rewards = [torch.nan if value is None else float(value) for value in rewards]
    return torch.tensor(gather_object(rewards)).unflatten(0, (len(dataset), num_samples))


def evaluate_latents(
    reasoner: LatentReasoner,
    dataset: Dataset,
    correctness_reward: Callable[..., list[float]],
    format_reward: Callable[..., list[float]] | None = None,
    format_weight: float = 1.0,
    **kwargs,
) -> dict[str, float]:
    """
    Metrics of a policy on held-out questions. Every process takes its share of them.

    Args:
        reasoner ([`LatentReasoner`]):
            Policy and main model.
        dataset ([`~datasets.Dataset`]):
            Questions with a column `"prompt"` and the columns that the rewards read.
        correctness_reward (`Callable`):
            Correctness reward, +1 or -1.
        format_reward (`Callable`, *optional*):
            Format reward, +1 or -1. Without it, `format` is missing and `reward` is correctness alone.
        format_weight (`float`, *optional*, defaults to `1.0`):
            Weight λ of the format reward in the total (equation 3).
        **kwargs:
            As for [`answer_questions`]: `control`, `num_samples`, `batch_size`, `seed`, `description`.

    Returns:
        `dict[str, float]`: `reward` (total), `accuracy` and `format` (shares), averaged over questions and samples,
        and `pass_at_k`, the share of questions with a correct answer among their `num_samples`, and `mixed`, the share
        of those whose samples differ in reward. Answers without a reward (`None`) are left out of each.
    """
    answers = answer_questions(reasoner, dataset, **kwargs)
    correct = score_answers(dataset, answers, correctness_reward)
    formatted = torch.full_like(correct, torch.nan)
    if format_reward is not None:
        formatted = score_answers(dataset, answers, format_reward)
    parts = torch.stack([correct, format_weight * formatted])
    rewards = parts.nansum(0).masked_fill(parts.isnan().all(0), torch.nan)
    is_judged, is_scored = ~correct.isnan(), ~rewards.isnan()
    highest = rewards.nan_to_num(-torch.inf).amax(1)
    is_mixed = highest > rewards.nan_to_num(torch.inf).amin(1)
    metrics = {
        "reward": rewards.double().nanmean().item(),
        "accuracy": (correct[is_judged] > 0).double().mean().item(),
        "format": (formatted[~formatted.isnan()] > 0).double().mean().item(),
        "pass_at_k": (correct > 0).any(dim=1)[is_judged.any(dim=1)].double().mean().item(),
        "mixed": is_mixed[is_scored.any(dim=1)].double().mean().item(),
    }
    if format_reward is None:
        del metrics["format"]
    return metrics
