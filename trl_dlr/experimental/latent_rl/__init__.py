# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .latent_rl_config import LatentRLConfig
from .latent_rl_trainer import LatentRLTrainer


__all__ = [
    "LatentRLConfig",
    "LatentRLTrainer",
]
