# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Densities of a latent step: what is sampled, scored and compared."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class DiagonalGaussian:
    """
    Exact density of one latent step, N(mean, diag(exp(log_std)²)), evaluated in float32.

    The paper ([arXiv 2601.17275](https://huggingface.co/papers/2601.17275), equation 5) leaves the density of the
    latents open; a Gaussian with a closed-form KL is this package's choice.

    Args:
        mean (`torch.Tensor` of shape `(batch_size, num_latents, latent_dim)`):
            Mean of each latent step.
        log_std (`torch.Tensor` broadcastable to `mean`):
            Natural logarithm of the standard deviation, in units of the latents.
    """

    mean: torch.Tensor
    log_std: torch.Tensor

    def __post_init__(self):
        self.mean = self.mean.float()
        self.log_std = self.log_std.float()

    def rsample(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Reparameterized sample `mean + std * noise`; `noise` is drawn from N(0, 1) if not given."""
        if noise is None:
            noise = torch.randn_like(self.mean)
        return self.mean + self.log_std.exp() * noise

    def noise_of(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverse of [`rsample`]: the standard normal noise that yields `latents` under this density."""
        return (latents.float() - self.mean) * (-self.log_std).exp()

    def log_prob(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Exact log-density of each latent step, in nats.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, num_latents, latent_dim)`):
                Latents to score.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_latents)`:
                Log-density summed over `latent_dim`.
        """
        noise = self.noise_of(latents)
        return (-0.5 * noise**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> torch.Tensor:
        """Differential entropy of each latent step in nats, shape `(batch_size, num_latents)`."""
        return (self.log_std.expand_as(self.mean) + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, reference: "DiagonalGaussian") -> torch.Tensor:
        """Closed-form KL(self || reference) of each latent step in nats, shape `(batch_size, num_latents)` (eq. 7)."""
        variance_ratio = (2 * (self.log_std - reference.log_std)).exp()
        shift = (self.mean - reference.mean) * (-reference.log_std).exp()
        return (reference.log_std - self.log_std + 0.5 * (variance_ratio + shift**2) - 0.5).sum(-1)


@dataclass
class StoppedDensity:
    r"""
    Exact joint density of each latent step and of the decision to stop after it, evaluated in float32:
    log p(z_t) + log Bernoulli(stop_t), both given the question and the steps before.

    A decision that is not free has probability 1: infinite log-odds say so. Steps after the last were not taken: their
    log-density, entropy and KL are 0, and so are their means and samples.

    Args:
        steps ([`DiagonalGaussian`] or another density of its interface):
            Density of the latents.
        stop_logits (`torch.Tensor` of shape `(batch_size, num_latents)`):
            Log-odds that a step is the last: -inf where the trajectory must go on, inf where it must stop.
        lengths (`torch.Tensor` of shape `(batch_size,)`):
            Steps that each trajectory took, at least one.
    """

    steps: DiagonalGaussian
    stop_logits: torch.Tensor
    lengths: torch.Tensor

    def __post_init__(self):
        place = torch.arange(self.stop_logits.size(1), device=self.stop_logits.device)
        self.is_taken = place < self.lengths.unsqueeze(1)
        self.is_last = place == self.lengths.unsqueeze(1) - 1
        self.is_free = self.is_taken & self.stop_logits.isfinite()
        self._logits = self.stop_logits.float().masked_fill(~self.is_free, 0.0)

    @property
    def mean(self) -> torch.Tensor:
        return self.steps.mean.masked_fill(~self.is_taken.unsqueeze(-1), 0.0)

    @property
    def log_std(self) -> torch.Tensor:
        return self.steps.log_std

    def rsample(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Reparameterized sample of the steps that were taken. The decision to stop has no such gradient."""
        return self.steps.rsample(noise).masked_fill(~self.is_taken.unsqueeze(-1), 0.0)

    def noise_of(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverse of [`rsample`], at the steps that were taken."""
        return self.steps.noise_of(latents)

    def log_prob(self, latents: torch.Tensor) -> torch.Tensor:
        """Exact joint log-density of each step and its decision in nats, shape `(batch_size, num_latents)`."""
        decision = F.logsigmoid(torch.where(self.is_last, self._logits, -self._logits))
        return self._joint(self.steps.log_prob(latents), decision)

    def entropy(self) -> torch.Tensor:
        """Entropy of each step and its decision in nats, shape `(batch_size, num_latents)`."""
        return self._joint(self.steps.entropy(), F.softplus(self._logits) - self._logits.sigmoid() * self._logits)

    def kl(self, reference: "StoppedDensity") -> torch.Tensor:
        """Closed-form KL(self || reference) of each step and its decision in nats, shape `(batch_size, num_latents)`."""
        shift = self._logits.sigmoid() * (self._logits - reference._logits)
        decision = shift + F.softplus(reference._logits) - F.softplus(self._logits)
        return self._joint(self.steps.kl(reference.steps), decision)

    def _joint(self, of_steps: torch.Tensor, of_decisions: torch.Tensor) -> torch.Tensor:
        return (of_steps + of_decisions.masked_fill(~self.is_free, 0.0)).masked_fill(~self.is_taken, 0.0)
