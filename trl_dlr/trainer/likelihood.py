# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a frozen main model is given, so that the likelihood of its completion has a gradient in the latents."""

from typing import Any

import torch
from transformers import PreTrainedModel


def given_latents(
    main_model: PreTrainedModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    latent_embeds: torch.Tensor,
    completion_ids: torch.Tensor,
    num_latents: torch.Tensor | None = None,
) -> dict[str, Any]:
    """
    `[prompt ; latents ; completion]` as inputs of the main model, with labels on the completion.

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
