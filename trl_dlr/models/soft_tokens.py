# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Soft tokens: a latent that is a mixture of token embeddings, drawn by perturbing next-token log-probabilities with
Gumbel noise. One exact density and two published surrogates for it.
"""

import math
from dataclasses import dataclass

import torch

from ..option_docs import described


# Latent-GRPO (arXiv 2604.27998): Gumbel noise clamped to this range, then shifted by its lower end to be one-sided
CLAMPED_GUMBEL = (-1.5, 3.0)


@described
@dataclass(kw_only=True)
class SoftTokenOptions:
    r"""
    How a soft token is drawn, whichever model draws it.

    Parameters:
        soft_token_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature τ of a soft token's mixture.
        one_sided_noise (`bool`, *optional*, defaults to `False`):
            Whether Gumbel noise is clamped and shifted to be at least 0, for Latent-GRPO's score (`"latent_grpo"`).
        latent_top_k (`int`, *optional*):
            Most likely tokens that are candidates of a soft token. If `None`, all.
        latent_top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass that the candidates must have.
        mixture_size (`int`, *optional*):
            Number K of candidates that are mixed, those with the highest perturbed log-probabilities. If `None`, all.
    """

    soft_token_temperature: float = 1.0
    one_sided_noise: bool = False
    latent_top_k: int | None = None
    latent_top_p: float = 1.0
    mixture_size: int | None = None

    def check_soft_tokens(self) -> None:
        """Refuse values that do not fit."""
        for name in ("latent_top_k", "mixture_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1 or unset, got {value}.")
        if not 0 < self.latent_top_p <= 1:
            raise ValueError(f"`latent_top_p` must be above 0 and at most 1, got {self.latent_top_p}.")
        if not (self.soft_token_temperature > 0 and math.isfinite(self.soft_token_temperature)):
            raise ValueError(f"`soft_token_temperature` must be a positive number, got {self.soft_token_temperature}.")


def gumbel_noise(
    shape: torch.Size, device: torch.device, is_one_sided: bool = False, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Standard Gumbel noise, or Latent-GRPO's one-sided noise: the same clamped to [-1.5, 3] and shifted to [0, 4.5].

    Args:
        shape (`torch.Size`):
            Shape.
        device (`torch.device`):
            Device.
        is_one_sided (`bool`, *optional*, defaults to `False`):
            Whether no candidate may be made less likely than it is. For Latent-GRPO's score only: there the gradient's
            sign is then the advantage's.
        generator (`torch.Generator`, *optional*):
            Where randomness comes from. If `None`, torch's global generator.
    """
    uniform = torch.rand(shape, device=device, generator=generator).clamp(min=torch.finfo(torch.float32).tiny)
    noise = -(-uniform.log()).clamp(min=torch.finfo(torch.float32).tiny).log()
    if not is_one_sided:
        return noise
    lowest, highest = CLAMPED_GUMBEL
    return noise.clamp(lowest, highest) - lowest


def keep_candidates(logits: torch.Tensor, top_k: int | None, top_p: float, min_candidates: int = 1) -> torch.Tensor:
    """
    Log-probabilities of the candidates that remain, `-inf` elsewhere: first the `top_k`, then those of them that have
    the mass `top_p` of what the `top_k` have, as transformers' samplers cut.

    Args:
        logits (`torch.Tensor` of shape `(..., vocab_size)`):
            Next-token logits.
        top_k (`int`, *optional*):
            Most likely tokens that may remain. If `None`, all.
        top_p (`float`):
            Share of the mass of these that must remain: the smallest set of most likely tokens that has it.
        min_candidates (`int`, *optional*, defaults to `1`):
            Tokens that remain however likely the first one is.

    Returns:
        `torch.Tensor`: float32 log-probabilities, normalized over what remains.
    """
    vocab_size = logits.size(-1)
    for name, value in (("top_k", top_k), ("min_candidates", min_candidates)):
        if value is not None and not 1 <= value <= vocab_size:
            raise ValueError(f"`{name}` must be between 1 and the vocabulary's {vocab_size} tokens, got {value}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be above 0 and at most 1, got {top_p}.")
    log_probs = logits.float().log_softmax(-1)
    ranked, order = log_probs.sort(dim=-1, descending=True)
    probs = ranked[..., :top_k].softmax(-1)
    is_best = (probs.cumsum(-1) - probs < top_p) | (top_p == 1)  # a sum of rounded ones may be 1 before the last
    is_best[..., :min_candidates] = True
    is_kept = torch.nn.functional.pad(is_best, (0, vocab_size - is_best.size(-1)))
    is_kept = torch.zeros_like(is_kept).scatter(-1, order, is_kept)
    return log_probs.masked_fill(~is_kept, -torch.inf).log_softmax(-1)


def gumbel_softmax(log_probs: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Mixture weights softmax((log π + noise) / τ), shape as `log_probs`; exactly 0 where `log_probs` is `-inf`.

    Args:
        log_probs (`torch.Tensor` of shape `(..., num_candidates)`):
            Log-probabilities log π.
        noise (`torch.Tensor` of shape `(..., num_candidates)`):
            Gumbel noise.
        temperature (`float`):
            Temperature τ above 0.
    """
    check_temperature(temperature)
    return ((log_probs.float() + noise) / temperature).softmax(-1)


def check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"`temperature` must be a number above 0, got {temperature}.")


def gumbel_softmax_log_prob(log_weights: torch.Tensor, log_probs: torch.Tensor, temperature: float) -> torch.Tensor:
    r"""
    Exact log-density of Gumbel-softmax weights on the simplex, in nats (Maddison et al., arXiv 1611.00712):

    \( \log\Gamma(K) + (K-1)\log\tau + \sum_k [\log\pi_k - (\tau+1)\log w_k] - K \log \sum_k \pi_k w_k^{-\tau} \)

    It is that of the whole vector: candidates that were cut off after the draw, or clamped noise, make it invalid.

    Args:
        log_weights (`torch.Tensor` of shape `(..., num_candidates)`):
            Logarithms of the weights w.
        log_probs (`torch.Tensor` of shape `(..., num_candidates)`):
            Log-probabilities log π of the same candidates; they need not be normalized.
        temperature (`float`):
            Temperature τ above 0.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    check_temperature(temperature)
    log_weights, log_probs = log_weights.float(), log_probs.float()
    size = log_weights.size(-1)
    constant = math.lgamma(size) + (size - 1) * math.log(temperature)
    each = (log_probs - (temperature + 1) * log_weights).sum(-1)
    return constant + each - size * (log_probs - temperature * log_weights).logsumexp(-1)


def lepo_score(weights: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """
    LEPO's surrogate for the log-probability of a soft token, Σ_k w_k log π_k (arXiv 2604.17892). As τ → 0 the weights
    are one-hot and it is the token's log-probability, exactly REINFORCE's.

    Args:
        weights (`torch.Tensor` of shape `(..., num_candidates)`):
            Mixture weights; candidates of weight 0 do not count.
        log_probs (`torch.Tensor` of shape `(..., num_candidates)`):
            Log-probabilities of the same candidates under the policy that is scored.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    return (weights.float() * log_probs.float().masked_fill(weights == 0, 0.0)).sum(-1)


def latent_grpo_score(perturbed: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """
    Latent-GRPO's surrogate for the log-probability of a soft token: with d_k = s_k - log π_k, the mean of
    -d_k - exp(-d_k) over the K candidates that were kept (arXiv 2604.27998). Each term is a Gumbel log-density of its
    own; that the K were the best of more, and the noise clamped, is left out. Under the policy that drew one-sided
    noise d_k ≥ 0, so the gradient (1 - exp(-d_k))/K has the advantage's sign.

    Args:
        perturbed (`torch.Tensor` of shape `(..., K)`):
            Perturbed log-probabilities s of the kept candidates, as they were drawn; `-inf` for others.
        log_probs (`torch.Tensor` of shape `(..., K)`):
            Log-probabilities of the same candidates under the policy that is scored.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    is_kept = ~perturbed.isneginf()
    difference = (perturbed.float() - log_probs.float()).masked_fill(~is_kept, 0.0)
    return (-difference - (-difference).exp()).masked_fill(~is_kept, 0.0).sum(-1) / is_kept.sum(-1)


# What a policy may be scored with: functions of perturbed log-probabilities, log-probabilities and temperature
SOFT_TOKEN_SCORES = {
    "exact": lambda perturbed, log_probs, temperature: gumbel_softmax_log_prob(
        (perturbed / temperature).log_softmax(-1), log_probs, temperature
    ),
    "lepo": lambda perturbed, log_probs, temperature: lepo_score((perturbed / temperature).softmax(-1), log_probs),
    "latent_grpo": lambda perturbed, log_probs, temperature: latent_grpo_score(perturbed, log_probs),
}
