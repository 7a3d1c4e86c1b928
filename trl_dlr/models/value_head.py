# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What latents are worth before anything is decoded from them."""

import torch
import torch.nn.functional as F
from torch import nn


VALUE_HEAD_FILE = "value_head.safetensors"  # beside the policy: part of what was trained
HIDDEN_SIZE = 128


def _layers(input_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(input_size, HIDDEN_SIZE),
        nn.SiLU(),
        nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE),
        nn.SiLU(),
        nn.Linear(HIDDEN_SIZE, 1),
    )


def _normalize(states: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(states.float(), states.shape[-1:], eps=1e-6)


class ValueHead(nn.Module):
    """
    Log-odds that a trajectory is rewarded, from its latents and the assistant's last hidden state of the question.

    Args:
        latent_size (`int`):
            Numbers in a trajectory, T * d.
        state_size (`int`):
            Hidden size of the assistant.
    """

    def __init__(self, latent_size: int, state_size: int):
        super().__init__()
        self.layers = _layers(latent_size + state_size)

    def forward(self, latents: torch.Tensor, question_states: torch.Tensor) -> torch.Tensor:
        """
        Latents `(batch_size, num_latents, latent_dim)` and states `(batch_size, hidden_size)` to `(batch_size,)`.
        """
        return self.layers(torch.cat([latents.float().flatten(1), _normalize(question_states)], dim=1)).squeeze(1)


class StateValueHead(nn.Module):
    """
    Log-odds that the answer is correct, from one latent that is a hidden state.

    Args:
        state_size (`int`):
            Hidden size of the language model.
    """

    def __init__(self, state_size: int):
        super().__init__()
        self.layers = _layers(state_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States `(..., hidden_size)` to `(...)`, in float32. They are normalized: their size has no value."""
        return self.layers(_normalize(states)).squeeze(-1)
