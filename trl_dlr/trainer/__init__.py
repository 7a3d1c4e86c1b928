# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .arguments import CurriculumArguments, GroupArguments, LatentPolicyArguments
from .coconut_sft_config import CoconutSFTConfig
from .coconut_sft_trainer import CoconutSFTTrainer
from .latent_grpo_config import LatentGRPOConfig
from .latent_grpo_trainer import LatentGRPOTrainer
from .latent_sft_config import LatentSFTConfig
from .latent_sft_trainer import LatentSFTTrainer
from .losses import contrastive_loss
from .soft_token_grpo_config import SoftTokenGRPOConfig
from .soft_token_grpo_trainer import SoftTokenGRPOTrainer


__all__ = [
    "CoconutSFTConfig",
    "CoconutSFTTrainer",
    "CurriculumArguments",
    "GroupArguments",
    "LatentGRPOConfig",
    "LatentGRPOTrainer",
    "LatentPolicyArguments",
    "LatentSFTConfig",
    "LatentSFTTrainer",
    "SoftTokenGRPOConfig",
    "SoftTokenGRPOTrainer",
    "contrastive_loss",
]
