# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
A look at a policy at one moment: its latents on a plane, the words that they are near, and what is written from them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ..generation import DecodingEngine, TransformersEngine
from ..models.architectures import embedding_device
from ..reasoners.latent_reasoner import LatentReasoner


VOCABULARY_CHUNK = 8192  # tokens compared at once


def principal_components(vectors: torch.Tensor, number: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Coordinates of vectors along their leading principal components.

    Args:
        vectors (`torch.Tensor` of shape `(num_vectors, size)`):
            Vectors, centred here.
        number (`int`, *optional*, defaults to `2`):
            Components. Those beyond the vectors' rank are 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: coordinates of shape `(num_vectors, number)`, and the share of the
        variance along each component. A component's largest entry is positive, so that the same vectors give the same
        map.
    """
    vectors = vectors.detach().double().cpu()
    centred = vectors - vectors.mean(0)
    left, sizes, right = torch.linalg.svd(centred, full_matrices=False)
    found = min(number, len(sizes))
    largest = right[:found].gather(1, right[:found].abs().argmax(dim=1, keepdim=True)).squeeze(1)
    signs = torch.where(largest < 0, -1.0, 1.0)
    coordinates = left[:, :found] * sizes[:found] * signs
    variances = sizes.square()
    shares = variances[:found] / variances.sum().clamp(min=torch.finfo(variances.dtype).tiny)
    missing = number - found
    return nn.functional.pad(coordinates, (0, missing)), nn.functional.pad(shares, (0, missing))


def embed_tokens_of(engine: DecodingEngine) -> nn.Module:
    """Input embeddings of the main model, whatever decodes it."""
    return engine.model.get_input_embeddings() if isinstance(engine, TransformersEngine) else engine.embed_tokens


@torch.no_grad()
def nearest_tokens(reasoner: LatentReasoner, embeddings: torch.Tensor, number: int = 5) -> list[list[dict[str, Any]]]:
    """
    Tokens of the main model whose input embeddings have the largest cosine with given ones.

    Args:
        reasoner ([`LatentReasoner`]):
            Policy and main model.
        embeddings (`torch.Tensor` of shape `(num_embeddings, hidden_size)`):
            Embeddings to name.
        number (`int`, *optional*, defaults to `5`):
            Tokens of each, the nearest first.

    Returns:
        `list[list[dict[str, Any]]]`: `id`, `text` and `cosine` of the tokens of each embedding.
    """
    embed_tokens, tokenizer = embed_tokens_of(reasoner.engine), reasoner.main_processing_class
    device = embedding_device(embed_tokens)
    size = min(embed_tokens.weight.size(0), len(tokenizer))  # a table may have rows beyond the vocabulary
    wanted = nn.functional.normalize(embeddings.to(device).float(), dim=-1)
    cosines = torch.empty(len(wanted), 0, device=device)
    ids = torch.empty(len(wanted), 0, dtype=torch.long, device=device)
    for chunk in torch.arange(size, device=device).split(VOCABULARY_CHUNK):
        # Through the module: some models scale embeddings on the way out
        table = nn.functional.normalize(embed_tokens(chunk).float(), dim=-1)
        cosines = torch.cat([cosines, wanted @ table.T], dim=1)
        ids = torch.cat([ids, chunk.expand(len(wanted), -1)], dim=1)
        cosines, indices = cosines.topk(min(number, cosines.size(1)), dim=1)
        ids = ids.gather(1, indices)
    return [
        [
            {"id": token, "text": tokenizer.decode([token]), "cosine": round(cosine, 4)}
            for token, cosine in zip(row, values, strict=True)
        ]
        for row, values in zip(ids.tolist(), cosines.tolist(), strict=True)
    ]


def _text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _judge(reward_func: Callable, rows: Dataset, texts: list[str], num_samples: int) -> list[dict[str, Any]]:
    """Completions with their rewards, `None` where a reward function has no opinion."""
    columns = {name: [value for value in rows[name] for _ in range(num_samples)] for name in rows.column_names}
    prompts = columns.pop("prompt")
    completions = texts if isinstance(prompts[0], str) else [[{"role": "assistant", "content": t}] for t in texts]
    rewards = reward_func(prompts=prompts, completions=completions, **columns)
    has_reward = [reward is not None and math.isfinite(reward) for reward in rewards]
    return [
        {"completion": text, "reward": float(reward) if has else None}
        for text, reward, has in zip(texts, rewards, has_reward, strict=True)
    ]


@torch.no_grad()
def take_probe(
    reasoner: LatentReasoner,
    questions: Dataset,
    reward_func: Callable[..., list[float]],
    num_samples: int = 16,
    num_tokens: int = 5,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """
    What a policy's latents look like, say and lead to, on some questions. Runs in this process alone, without a
    collective operation, and leaves torch's random numbers as they were.

    Args:
        reasoner ([`LatentReasoner`]):
            Policy and main model.
        questions ([`~datasets.Dataset`]):
            Questions with a column `"prompt"` and the columns that the reward reads.
        reward_func (`Callable`):
            Reward of a completion.
        num_samples (`int`, *optional*, defaults to `16`):
            Trajectories sampled per question.
        num_tokens (`int`, *optional*, defaults to `5`):
            Nearest tokens of each latent.
        batch_size (`int`, *optional*, defaults to `8`):
            Questions decoded together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the trajectories.

    Returns:
        `dict[str, Any]`: what JSON can hold:
            - `variance_shares`: share of the variance of all sampled trajectories along the two axes of the map.
            - `questions`: for each its `prompt`, its `answer` if there is a column `"answer"`, `"solution"` or
              `"completion"`, and
                - `alone`: `completion` and `reward` of the main model without latents.
                - `samples`: `completion`, `reward` and place (`x`, `y`) of each sampled trajectory, whose T latents
                  are one point.
                - `tokens`: the nearest tokens of each step's embedding, for *mean* latents, not sampled ones, up to a
                  learned stop.
                - `offset_tokens`: those of its distance from the anchor token, with `injection="anchors"`, where the
                  anchor itself is the nearest unless the latent is large.
    """
    if len(questions) == 0 or "prompt" not in questions.column_names:
        raise ValueError(f"`questions` must have rows and a column 'prompt', got {questions}.")
    if num_samples < 2:
        raise ValueError(f"`num_samples` must be at least 2, to make a map, got {num_samples}.")
    policy = reasoner.policy
    is_anchored = policy.config.has_anchors
    found, trajectories = [], []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(questions), batch_size), "Answers for the report", leave=False):
            rows = questions.select(range(start, min(start + batch_size, len(questions))))
            prompts = list(rows["prompt"])
            alone = _judge(reward_func, rows, reasoner.decode(prompts), 1)
            latents, lengths = reasoner.sample_latents(prompts, num_samples)
            samples = _judge(reward_func, rows, reasoner.decode(prompts, latents, lengths), num_samples)
            trajectories.append(policy.features(latents).flatten(1).cpu())
            means, num_steps = reasoner.sample_latents(prompts, deterministic=True)
            embeddings = policy.inject(means)
            words = {"tokens": nearest_tokens(reasoner, embeddings.flatten(0, 1), num_tokens)}
            if is_anchored:
                offsets = embeddings - policy.inject(torch.zeros_like(latents[:1]))
                words["offset_tokens"] = nearest_tokens(reasoner, offsets.flatten(0, 1), num_tokens)
            gold = next((rows[name] for name in ("answer", "solution", "completion") if name in rows.features), None)
            for index, prompt in enumerate(prompts):
                question = {"prompt": _text(prompt), "alone": alone[index]}
                if gold is not None:
                    question["answer"] = _text(gold[index]) if isinstance(gold[index], list) else str(gold[index])
                question["samples"] = samples[index * num_samples : (index + 1) * num_samples]
                first = index * embeddings.size(1)
                question |= {name: of[first : first + num_steps[index]] for name, of in words.items()}
                found.append(question)
    coordinates, shares = principal_components(torch.cat(trajectories))
    everything = [sample for question in found for sample in question["samples"]]
    for sample, (x, y) in zip(everything, coordinates.tolist(), strict=True):
        sample |= {"x": round(x, 4), "y": round(y, 4)}
    return {"variance_shares": [round(share, 4) for share in shares.tolist()], "questions": found}
