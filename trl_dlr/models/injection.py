# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""From latents to embeddings of the main model."""

import itertools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .architectures import embedding_table


INJECTIONS = ("anchors", "components", "trained")


class LatentInjector(nn.Module):
    r"""
    Maps latents to input embeddings of the main model (equation 5 and 10 of
    [DeepLatent Reasoning](https://huggingface.co/papers/2601.17275)):
    \( e_t = b_t + s \cdot \mathrm{RMS} \cdot W z_t \), where RMS is measured on the main model's token embeddings and
    the rows of W are orthogonal with length \( \sqrt{H/d} \) (its columns with length 1, where d is above H), so that a
    latent of unit variance moves its embedding by `scale` times the RMS of a token embedding.

    - `"anchors"`: b_t is the embedding of an anchor token (the text's tokens in turn), W a random orthonormal basis.
    - `"components"`: b = 0, the rows of W are the leading principal components of the embedding table.
    - `"trained"`: as `"components"`, and W is a parameter. It lies after the sample, so a pure policy gradient does
      not reach it: it needs a supervised stage or a loss through the main model.

    Args:
        latent_dim (`int`):
            Size d of a latent.
        num_latents (`int`):
            Number T of latent steps.
        hidden_size (`int`):
            Size H of the main model's input embeddings.
        injection (`str`):
            One of `"anchors"`, `"components"` and `"trained"`.
        scale (`float`):
            Root mean square of the latents' share of an embedding, in units of the measured RMS.
    """

    def __init__(self, latent_dim: int, num_latents: int, hidden_size: int, injection: str, scale: float):
        super().__init__()
        self.injection = injection
        self.scale = scale
        # Persistent: a saved policy holds all that it needs to speak to its main model
        self.register_buffer("anchors", torch.zeros(num_latents, hidden_size))
        self.register_buffer("rms", torch.zeros(()))
        weight = torch.zeros(latent_dim, hidden_size)
        if injection == "trained":
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    @torch.no_grad()
    def fit(
        self, main_model: PreTrainedModel, main_processing_class: PreTrainedTokenizerBase, anchor_text: str
    ) -> list[int] | None:
        """
        Measure the main model's embedding table and set RMS, anchors and W from it. Returns the tokens that are the
        anchors, if there are any.
        """
        table = embedding_table(main_model.get_input_embeddings()).float()
        latent_dim, hidden_size = self.weight.shape
        anchor_ids = None
        self.rms.copy_(table.square().mean().sqrt())
        if self.injection == "anchors":
            ids = main_processing_class(anchor_text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise ValueError(
                    f"`anchor_text` must hold at least one token of the main model, but {anchor_text!r} tokenizes to "
                    "nothing. Use a short text such as 'Answer: '."
                )
            anchor_ids = list(itertools.islice(itertools.cycle(ids), self.anchors.size(0)))
            self.anchors.copy_(table[anchor_ids])
            basis = nn.init.orthogonal_(torch.empty(latent_dim, hidden_size))
        else:
            if latent_dim > hidden_size:
                raise ValueError(
                    f"`latent_dim={latent_dim}` exceeds the main model's embedding size {hidden_size}, which has no "
                    f"more principal components. Lower it, or use `injection='anchors'` instead of {self.injection!r}."
                )
            centered = table - table.mean(0)
            _, eigenvectors = torch.linalg.eigh(centered.T @ centered)  # ascending
            basis = eigenvectors.flip(1).T[:latent_dim]
        self.weight.copy_(basis * max(hidden_size / latent_dim, 1.0) ** 0.5)
        return anchor_ids

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Args:
            latents (`torch.Tensor` of shape `(batch_size, num_latents, latent_dim)`):
                Latents to inject, all or the first ones.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_latents, hidden_size)`:
                float32 embeddings for the main model.
        """
        with torch.autocast(latents.device.type, enabled=False):
            anchors = self.anchors[: latents.size(1)].float()
            return anchors + self.scale * self.rms.float() * (latents.float() @ self.weight.float())

    def features(self, latents: torch.Tensor) -> torch.Tensor:
        """What latents are compared by, judged by and fed back as: themselves."""
        return latents


class SoftTokenInjector(nn.Module):
    r"""
    Soft tokens as input embeddings of the main model: \( e_t = \sum_k w_k E_k \) with w = softmax(s/τ), on the
    manifold of its token embeddings by construction.

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
        self.embeddings = embedding_table(main_model.get_input_embeddings()).detach().to(device)

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
