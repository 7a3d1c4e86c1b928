# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The parts of a latent policy that emits soft tokens over the main model's vocabulary: its head and its injection."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .densities import SoftTokens
from .soft_tokens import SOFT_TOKEN_SCORES, gumbel_noise, keep_candidates


def vocabulary_size(main_model: PreTrainedModel) -> int:
    """Number of tokens that `main_model` has both an input embedding and a logit for."""
    embed, unembed = main_model.get_input_embeddings().weight, main_model.get_output_embeddings().weight
    if embed.shape != unembed.shape or not unembed.is_floating_point() or unembed.is_meta or embed.is_meta:
        raise ValueError(
            "`latent_density='soft_tokens'` needs a main model with input and output embeddings of one shape, in floating point "
            f"and not offloaded; `main_model` has {tuple(embed.shape)} {embed.dtype} on {embed.device} and "
            f"{tuple(unembed.shape)} {unembed.dtype} on {unembed.device}. Use `latent_density='gaussian'`."
        )
    return embed.size(0)


class SoftTokenHead(nn.Linear):
    """
    Density of a latent step from the assistant's hidden state: a trained map to the main model's hidden size, then its
    frozen output embeddings. The map starts as the identity where sizes allow it, so that an assistant made of the main
    model's first layers starts with what these would say next.

    Args:
        config ([`LatentPolicyConfig`]):
            Configuration of the policy.
    """

    def __init__(self, config: Any):
        super().__init__(config.hidden_size, config.main_hidden_size or config.hidden_size, bias=False)
        for name in ("latent_top_k", "mixture_size"):
            if (getattr(config, name) or 0) > config.latent_dim:
                raise ValueError(
                    f"`{name}` must be at most the main model's {config.latent_dim} tokens, got {getattr(config, name)}."
                )
        self.temperature = config.soft_token_temperature
        self.score = SOFT_TOKEN_SCORES[config.soft_token_score]
        self.is_one_sided = config.one_sided_noise
        self.cuts = config.latent_top_k, config.latent_top_p, config.mixture_size
        self.register_buffer("unembedding", None, persistent=False)  # the main model's, see `attach`

    def attach(self, main_model: PreTrainedModel, device: torch.device) -> None:
        """Take the output embeddings of `main_model`, which are not saved with the policy."""
        self.unembedding = main_model.get_output_embeddings().weight.detach().to(device)

    def reset_parameters(self) -> None:
        (init.eye_ if self.in_features == self.out_features else init.orthogonal_)(self.weight)

    def forward(self, hidden_states: torch.Tensor) -> SoftTokens:
        if self.unembedding is None:
            raise ValueError("The policy has no main model's vocabulary yet. Call `attach_main_model(main_model)`.")
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(F.linear(hidden_states.float(), self.weight.float()), self.unembedding.float())
            return SoftTokens(logits.log_softmax(-1), self.temperature, self.score)

    def draw_noise(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        return gumbel_noise(shape, device, self.is_one_sided)

    def draw(self, density: SoftTokens, noise: torch.Tensor) -> torch.Tensor:
        """Latents of `density`, drawn with `noise`, without the tokens that are no candidates."""
        top_k, top_p, mixture_size = self.cuts
        if top_k is not None or top_p < 1:
            candidates = keep_candidates(density.log_probs.detach(), top_k, top_p, mixture_size or 1)
            noise = noise.masked_fill(candidates.isneginf(), -torch.inf)
        latents = density.rsample(noise)
        if mixture_size is not None:
            mixed = latents.topk(mixture_size, dim=-1).indices
            latents = latents.masked_fill(torch.ones_like(latents).scatter(-1, mixed, 0.0).bool(), -torch.inf)
        return latents


class SoftTokenInjector(nn.Module):
    r"""
    Soft tokens as input embeddings of the main model: \( e_t = \sum_k w_k E_k \) with w = softmax(s/τ), on the manifold
    of its token embeddings by construction.

    Args:
        config ([`LatentPolicyConfig`]):
            Configuration of the policy.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.temperature = config.soft_token_temperature
        self.register_buffer("embeddings", None, persistent=False)  # the main model's, see `attach`

    @torch.no_grad()
    def attach(self, main_model: PreTrainedModel, device: torch.device) -> None:
        """Take the input embeddings of `main_model`, which are not saved with the policy."""
        embed = main_model.get_input_embeddings()
        # Through the module rather than its weight: some models scale embeddings on the way out
        ids = torch.arange(embed.weight.size(0), device=embed.weight.device)
        self.embeddings = torch.cat([embed(part) for part in ids.split(8192)]).to(device)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Args:
            latents (`torch.Tensor` of shape `(batch_size, num_latents, vocab_size)`):
                Perturbed log-probabilities of the main model's tokens, -inf for those that are not mixed.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_latents, hidden_size)`:
                float32 embeddings for the main model.
        """
        with torch.autocast(latents.device.type, enabled=False):
            return (latents.float() / self.temperature).softmax(-1) @ self.embeddings.float()

    # A mixture is all that the main model sees of a latent
    features = forward
