# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Heads of a latent policy: from the assistant's hidden states to the densities of latents, and of the decision to stop.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .densities import DiagonalGaussian, SoftTokens
from .latent_policy_config import LatentPolicyConfig
from .soft_tokens import SOFT_TOKEN_SCORES, gumbel_noise, keep_candidates


def vocabulary_size(main_model: PreTrainedModel) -> int:
    """Number of tokens that `main_model` has both an input embedding and a logit for."""
    embed, unembed = main_model.get_input_embeddings().weight, main_model.get_output_embeddings().weight
    if embed.shape != unembed.shape or not unembed.is_floating_point() or unembed.is_meta or embed.is_meta:
        raise ValueError(
            "`latent_density='soft_tokens'` needs a main model with input and output embeddings of one shape, in "
            f"floating point and not offloaded; `main_model`, a {main_model.config.get_text_config().model_type} model, "
            f"has {tuple(embed.shape)} {embed.dtype} on {embed.device} "
            f"and {tuple(unembed.shape)} {unembed.dtype} on {unembed.device}. Use `latent_density='gaussian'`."
        )
    return embed.size(0)


class LatentHead(nn.Module):
    """
    Density of a latent step from the assistant's hidden state h: μ = W_μ · norm(h) (eq. 9), and σ fixed, learned, or
    with log σ + W_σ · norm(h).
    """

    def __init__(self, config: LatentPolicyConfig):
        super().__init__()
        self.mean = nn.Linear(config.hidden_size, config.latent_dim)
        log_std = torch.full((config.latent_dim,), math.log(config.sigma))
        if config.learn_sigma:
            self.log_std = nn.Parameter(log_std)
        else:
            self.register_buffer("log_std", log_std)
        self.log_std_shift = nn.Linear(config.hidden_size, config.latent_dim) if config.state_sigma else None

    def forward(self, hidden_states: torch.Tensor) -> DiagonalGaussian:
        # Densities are float32 whatever the assistant computes in: a log-ratio sums over T * d dimensions
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:], eps=1e-6)
            mean = F.linear(hidden_states, self.mean.weight.float(), self.mean.bias.float())
            # A copy: DDP takes a parameter that is itself an output for one that was not used
            log_std = self.log_std.clone()
            if (shift := self.log_std_shift) is not None:
                log_std = log_std + F.linear(hidden_states, shift.weight.float(), shift.bias.float())
            return DiagonalGaussian(mean, log_std)

    def reset_parameters(self) -> None:
        # ‖μ‖ starts well below σ: the first groups are explored rather than decided
        init.normal_(self.mean.weight, std=0.1 / math.sqrt(self.mean.in_features))
        init.zeros_(self.mean.bias)
        if self.log_std_shift is not None:
            init.zeros_(self.log_std_shift.weight)
            init.zeros_(self.log_std_shift.bias)

    def draw_noise(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def draw(self, density: DiagonalGaussian, noise: torch.Tensor) -> torch.Tensor:
        """Latents of `density`, drawn with `noise`."""
        return density.rsample(noise)


class SoftTokenHead(nn.Linear):
    """
    Density of a latent step from the assistant's hidden state: a trained map to the main model's hidden size, then its
    frozen output embeddings. The map starts as the identity where sizes allow it, so that an assistant made of the
    main model's first layers starts with what these would say next.

    Args:
        config ([`LatentPolicyConfig`]):
            Configuration of the policy.
    """

    def __init__(self, config: LatentPolicyConfig):
        super().__init__(config.hidden_size, config.main_hidden_size or config.hidden_size, bias=False)
        for name in ("latent_top_k", "mixture_size"):
            if (getattr(config, name) or 0) > config.latent_dim:
                raise ValueError(
                    f"`{name}` must be at most the main model's {config.latent_dim} tokens, got "
                    f"{getattr(config, name)}."
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

    def draw_noise(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        return gumbel_noise(shape, device, self.is_one_sided, generator)

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


class StopHead(nn.Linear):
    """
    Log-odds that a step is the last, from the state that its latent is drawn from; infinite where nothing is free.
    """

    def __init__(self, config: LatentPolicyConfig):
        super().__init__(config.hidden_size, 1)
        self.min_latents = config.min_latents
        self.num_latents = config.num_latents

    def forward(self, hidden_states: torch.Tensor, num_before: int = 0) -> torch.Tensor:
        """States `(batch_size, T, hidden_size)` of the steps after the first `num_before` to `(batch_size, T)`."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:], eps=1e-6)
            logits = F.linear(hidden_states, self.weight.float(), self.bias.float()).squeeze(-1)
        step = 1 + num_before + torch.arange(logits.size(1), device=logits.device)
        logits = logits.masked_fill(step < self.min_latents, -torch.inf)
        return logits.masked_fill(step >= self.num_latents, torch.inf)
