# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .latent_grpo_config import LatentGRPOConfig
from .latent_grpo_trainer import LatentGRPOTrainer
from .latent_sft_config import LatentSFTConfig
from .latent_sft_trainer import LatentSFTTrainer
from .losses import contrastive_loss
from .report_callback import LatentReportCallback


__all__ = [
    "LatentGRPOConfig",
    "LatentGRPOTrainer",
    "LatentReportCallback",
    "LatentSFTConfig",
    "LatentSFTTrainer",
    "contrastive_loss",
]
