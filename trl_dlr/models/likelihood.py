# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Likelihood of completions under the frozen main model, given latents."""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..generation.transformers_engine import contiguous_lm_head


def given_latents(
    main_model: PreTrainedModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    latent_embeds: torch.Tensor,
    completion_ids: torch.Tensor,
    num_latents: torch.Tensor | None = None,
) -> dict[str, Any]:
    """
    `[prompt ; latents ; completion]` as inputs of the main model, with labels on the completion. Their likelihood has a
    gradient in the latents.

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM.
        prompt_ids (`torch.Tensor` of shape `(batch_size, prompt_length)`):
            Left-padded prompts.
        prompt_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`):
            0 on padding.
        latent_embeds (`torch.Tensor` of shape `(batch_size, T, hidden_size)`):
            Injected latents.
        completion_ids (`torch.Tensor` of shape `(batch_size, completion_length)`):
            Completions, padded with -100 on the right.
        num_latents (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Latents of each row, the first ones, if not all.

    Returns:
        `dict[str, Any]`: keyword arguments.
    """
    size = latent_embeds.size(1)
    missing = torch.zeros_like(prompt_ids[:, 0]) if num_latents is None else size - num_latents
    # A row with fewer latents has them on the right: the completion's first token is read off the last of them
    place = torch.arange(size, device=prompt_ids.device) - missing.unsqueeze(1)
    latent_embeds = latent_embeds.gather(1, place.clamp(min=0).unsqueeze(2).expand_as(latent_embeds))
    embed = main_model.get_input_embeddings()
    prompt_embeds = embed(prompt_ids)
    parts = [prompt_embeds, latent_embeds, embed(completion_ids.clamp(min=0))]
    mask = torch.cat([prompt_mask.long(), (place >= 0).long(), (completion_ids != -100).long()], dim=1)
    before = completion_ids.new_full((len(prompt_ids), prompt_ids.size(1) + size), -100)
    return {
        "inputs_embeds": torch.cat([part.to(prompt_embeds.dtype) for part in parts], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": torch.cat([before, completion_ids], dim=1),
    }


@torch.no_grad()
def completion_log_probs(
    main_model: PreTrainedModel,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    latent_embeds: torch.Tensor | None = None,
    num_latents: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], list[bool]]:
    """
    Log-probabilities of given completions, without gradient.

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM.
        prompt_ids (`list[list[int]]`):
            Prompts, at least one token each.
        completion_ids (`list[list[int]]`):
            Their completions, at least one token each.
        latent_embeds (`torch.Tensor` of shape `(len(prompt_ids), T, hidden_size)`, *optional*):
            Embeddings between prompt and completion. Without them the main model is on its own.
        num_latents (`torch.Tensor` of shape `(len(prompt_ids),)`, *optional*):
            Latents of each row, the first ones, if not all.

    Returns:
        `tuple[list[torch.Tensor], list[bool]]`: float32 log-probability of each token of each completion, and whether
        greedy decoding would give the completion.
    """
    embed, device = main_model.get_input_embeddings(), main_model.device

    def padded(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
        return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value, side).to(device)

    if latent_embeds is None:
        latent_embeds = embed.weight.new_empty(len(prompt_ids), 0, embed.embedding_dim)
    prompts, completions = padded(prompt_ids, 0, "left"), padded(completion_ids, -100, "right")
    mask = padded([[1] * len(ids) for ids in prompt_ids], 0, "left")
    num_latents = None if num_latents is None else num_latents.to(device)
    inputs = given_latents(main_model, prompts, mask, latent_embeds.to(device), completions, num_latents)
    del inputs["labels"]
    # The last position before the completion gives its first token, and nothing is read off its last one
    with contiguous_lm_head(main_model):
        logits = main_model(**inputs, use_cache=False, logits_to_keep=completions.size(1) + 1).logits[:, :-1].float()
    targets = completions.clamp(min=0)
    log_probs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    is_greedy = ((logits.argmax(-1) == targets) | (completions == -100)).all(1)
    return [row[: len(ids)].cpu() for row, ids in zip(log_probs, completion_ids, strict=True)], is_greedy.tolist()
