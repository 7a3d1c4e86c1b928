# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Densities of a latent step: what is sampled, scored and compared."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .soft_tokens import SOFT_TOKEN_SCORES, check_temperature, gumbel_noise


@dataclass
class DiagonalGaussian:
    """
    Exact density of one latent step, N(mean, diag(exp(log_std)²)), evaluated in float32.

    The paper ([arXiv 2601.17275](https://huggingface.co/papers/2601.17275), equation 5) leaves the density of the
    latents open; a Gaussian with a closed-form KL is this package's choice.

    Args:
        mean (`torch.Tensor` of shape `(batch_size, num_latents, latent_dim)`):
            Mean of each latent step.
        log_std (`torch.Tensor` of shape `(latent_dim,)` or as `mean`):
            Natural logarithm of the standard deviation, in units of the latents: the same for all steps, or of each.
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

    def size(self) -> torch.Tensor:
        """
        Root mean square of mean/std at each latent step, shape `(batch_size, num_latents)`: signal against noise.
        """
        return (self.mean * (-self.log_std).exp()).square().mean(-1).sqrt()

    def rows(self) -> dict[str, torch.Tensor]:
        """Parameters by name that every row of the batch has its own of."""
        return {"mean": self.mean, **({"log_std": self.log_std} if self.log_std.dim() > 1 else {})}

    def stored(self) -> dict[str, torch.Tensor]:
        """All parameters by name, with an entry for each row of the batch."""
        rows = self.rows()
        return rows if "log_std" in rows else rows | {"log_std": self.log_std.expand(self.mean.size(0), 1, -1)}

    def replace(self, parameters: dict[str, torch.Tensor]) -> "DiagonalGaussian":
        """The same density with other parameters, those of `rows` or of `stored`."""
        return replace(self, **parameters)

    def metrics(self) -> dict[str, torch.Tensor]:
        """What is logged of it: the mean length of its means, and of its standard deviations."""
        return {"mean_norm": self.mean.norm(dim=-1).mean(), "sigma": self.log_std.exp().mean()}


@dataclass
class SoftTokens:
    r"""
    Density of one latent step that is a soft token: perturbed log-probabilities \( s = \log\pi + g \) of the main
    model's tokens, g Gumbel noise. The main model is given the mixture of token embeddings with weights softmax(s/τ),
    whose density is that of Gumbel-softmax. Evaluated in float32.

    Args:
        log_probs (`torch.Tensor` of shape `(batch_size, num_latents, vocab_size)`):
            Log-probabilities log π of each latent step, normalized over the vocabulary.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature τ of the mixture, above 0.
        score (`Callable`, *optional*):
            What `log_prob` is, from perturbed log-probabilities, log-probabilities and temperature: one of
            `SOFT_TOKEN_SCORES`. By default the exact density, for latents of which no token was cut.
    """

    log_probs: torch.Tensor
    temperature: float = 1.0
    score: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = SOFT_TOKEN_SCORES["exact"]

    def __post_init__(self):
        check_temperature(self.temperature)
        self.log_probs = self.log_probs.float()

    @property
    def mean(self) -> torch.Tensor:
        """The latent without noise, the log-probabilities themselves."""
        return self.log_probs

    def rsample(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """
        Reparameterized sample log π + noise; Gumbel noise is drawn if none is given. Where the noise is -inf a token
        is no part of the mixture.
        """
        return self.log_probs + (gumbel_noise(self.log_probs.shape, self.log_probs.device) if noise is None else noise)

    def noise_of(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverse of [`rsample`]: the noise that yields `latents` under this density, -inf where they are."""
        return latents.float() - self.log_probs

    def log_prob(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Score of each latent step, in nats: the exact log-density of its mixture weights, or the surrogate `score`.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, num_latents, vocab_size)`):
                Perturbed log-probabilities, -inf for tokens that are no part of the mixture.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_latents)`.
        """
        return self.score(latents.float(), self.log_probs, self.temperature)

    def entropy(self) -> torch.Tensor:
        """
        Entropy of π at each latent step in nats, shape `(batch_size, num_latents)`: that of the heaviest token, not
        the differential entropy of the mixture.
        """
        return -(self.log_probs.exp() * self.log_probs).sum(-1)

    def kl(self, reference: "SoftTokens") -> torch.Tensor:
        """
        KL of π to the reference's at each latent step in nats, shape `(batch_size, num_latents)`. The heaviest token
        of a mixture is distributed as π (the Gumbel-max trick), so by data processing this is a lower bound of the KL
        between the mixtures' densities, which has no closed form.
        """
        return (self.log_probs.exp() * (self.log_probs - reference.log_probs)).sum(-1)

    def size(self) -> torch.Tensor:
        """
        Standard deviation of the log-probabilities over the vocabulary at each latent step, in units of that of Gumbel
        noise (π/√6), shape `(batch_size, num_latents)`: signal against noise.
        """
        return self.log_probs.std(-1, correction=0) * math.sqrt(6) / math.pi

    def rows(self) -> dict[str, torch.Tensor]:
        """Parameters by name that every row of the batch has its own of."""
        return {"log_probs": self.log_probs}

    stored = rows

    def replace(self, parameters: dict[str, torch.Tensor]) -> "SoftTokens":
        """The same density with other parameters, those of `rows`."""
        return replace(self, **parameters)

    def metrics(self) -> dict[str, torch.Tensor]:
        """What is logged of it: the mean probability of the likeliest token."""
        return {"top_probability": self.log_probs.amax(-1).exp().mean()}


@dataclass
class StoppedDensity:
    r"""
    Exact joint density of each latent step and of the decision to stop after it, evaluated in float32:
    log p(z_t) + log Bernoulli(stop_t), both given the question and the steps before.

    A decision that is not free has probability 1: infinite log-odds say so. Steps after the last were not taken: their
    log-density, entropy and KL are 0, and so are their means and samples.

    Args:
        steps ([`DiagonalGaussian`] or [`SoftTokens`]):
            Density of the latents.
        stop_logits (`torch.Tensor` of shape `(batch_size, num_latents)`):
            Log-odds that a step is the last: -inf where the trajectory must go on, inf where it must stop.
        lengths (`torch.Tensor` of shape `(batch_size,)`):
            Steps that each trajectory took, at least one.
    """

    steps: DiagonalGaussian | SoftTokens
    stop_logits: torch.Tensor
    lengths: torch.Tensor

    def __post_init__(self):
        index = torch.arange(self.stop_logits.size(1), device=self.stop_logits.device)
        self.is_taken = index < self.lengths.unsqueeze(1)
        self.is_last = index == self.lengths.unsqueeze(1) - 1
        self.is_free = self.is_taken & self.stop_logits.isfinite()
        self._logits = self.stop_logits.float().masked_fill(~self.is_free, 0.0)

    @property
    def mean(self) -> torch.Tensor:
        return self.steps.mean.masked_fill(~self.is_taken.unsqueeze(-1), 0.0)

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
        """
        Closed-form KL(self || reference) of each step and its decision in nats, shape `(batch_size, num_latents)`.
        """
        shift = self._logits.sigmoid() * (self._logits - reference._logits)
        decision = shift + F.softplus(reference._logits) - F.softplus(self._logits)
        return self._joint(self.steps.kl(reference.steps), decision)

    def _joint(self, of_steps: torch.Tensor, of_decisions: torch.Tensor) -> torch.Tensor:
        return (of_steps + of_decisions.masked_fill(~self.is_free, 0.0)).masked_fill(~self.is_taken, 0.0)

    def size(self) -> torch.Tensor:
        """That of the latents, 0 at steps that were not taken."""
        return self.steps.size().masked_fill(~self.is_taken, 0.0)

    def rows(self) -> dict[str, torch.Tensor]:
        """Parameters by name that every row of the batch has its own of."""
        return {**self.steps.rows(), "stop_logits": self.stop_logits, "lengths": self.lengths}

    def stored(self) -> dict[str, torch.Tensor]:
        """All parameters by name, with an entry for each row of the batch."""
        return {**self.steps.stored(), "stop_logits": self.stop_logits, "lengths": self.lengths}

    def replace(self, parameters: dict[str, torch.Tensor]) -> "StoppedDensity":
        """The same density with other parameters, those of `rows` or of `stored`."""
        parameters = dict(parameters)
        stop_logits, lengths = parameters.pop("stop_logits"), parameters.pop("lengths")
        return StoppedDensity(self.steps.replace(parameters), stop_logits, lengths)

    def metrics(self) -> dict[str, torch.Tensor]:
        """What is logged of it: that of the latents that are there."""
        taken = {name: parameter[self.is_taken].unsqueeze(1) for name, parameter in self.steps.rows().items()}
        return self.steps.replace(taken).metrics()


Density = DiagonalGaussian | SoftTokens | StoppedDensity


def concatenate(densities: list[Density], dim: int = 0) -> Density:
    """One density of the rows (`dim=0`) or latent steps (`dim=1`) of several, one after the other."""
    parts = [density.rows() for density in densities]
    return densities[-1].replace({name: torch.cat([part[name] for part in parts], dim) for name in parts[0]})


def take_rows(density: Density, rows: torch.Tensor) -> Density:
    """Density of some rows of a batch."""
    return density.replace({name: parameter[rows] for name, parameter in density.rows().items()})


def put_rows(density: Density, rows: torch.Tensor, num_rows: int) -> Density:
    """Density of a batch of `num_rows` rows that is `density` in some of them, and has parameters of 0 elsewhere."""
    empty = {name: parameter.new_zeros(num_rows, *parameter.shape[1:]) for name, parameter in density.rows().items()}
    return density.replace({name: empty[name].index_copy(0, rows, part) for name, part in density.rows().items()})
