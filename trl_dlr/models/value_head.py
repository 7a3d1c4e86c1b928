# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a trajectory is worth before it is decoded."""

import torch
import torch.nn.functional as F
from torch import nn


VALUE_HEAD_FILE = "value_head.safetensors"  # beside the policy: part of what was trained
HIDDEN_SIZE = 128


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
        self.layers = nn.Sequential(
            nn.Linear(latent_size + state_size, HIDDEN_SIZE),
            nn.SiLU(),
            nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE),
            nn.SiLU(),
            nn.Linear(HIDDEN_SIZE, 1),
        )

    def forward(self, latents: torch.Tensor, question_states: torch.Tensor) -> torch.Tensor:
        """Latents `(batch_size, num_latents, latent_dim)` and states `(batch_size, hidden_size)` to `(batch_size,)`."""
        states = F.rms_norm(question_states.float(), question_states.shape[-1:], eps=1e-6)
        return self.layers(torch.cat([latents.float().flatten(1), states], dim=1)).squeeze(1)
