# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Densities of a latent step: what is sampled, scored and compared."""

import math
from dataclasses import dataclass

import torch


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
