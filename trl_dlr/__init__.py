# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Train reasoning in latent space with TRL: a small policy whose continuous latents steer a frozen main model."""

import importlib
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING


__version__ = version("trl_dlr")

# Where bitsandbytes is installed, transformers and PEFT import it, and on a CPU it warns of a kernel that it can do
# without
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_MODULE_OF = {
    "CoconutSFTConfig": "trainer",
    "CoconutSFTTrainer": "trainer",
    "LatentGRPOConfig": "trainer",
    "LatentGRPOTrainer": "trainer",
    "LatentPolicyConfig": "models",
    "LatentPolicyModel": "models",
    "LatentReasoner": "reasoners",
    "LatentReportCallback": "report",
    "LatentSFTConfig": "trainer",
    "LatentSFTTrainer": "trainer",
    "SoftTokenGRPOConfig": "trainer",
    "SoftTokenGRPOTrainer": "trainer",
    "ThinkingConfig": "models.thinking",
    "ThinkingReasoner": "reasoners",
    "first_layers": "models",
    "fresh_layers": "models",
}

__all__ = [
    "CoconutSFTConfig",
    "CoconutSFTTrainer",
    "LatentGRPOConfig",
    "LatentGRPOTrainer",
    "LatentPolicyConfig",
    "LatentPolicyModel",
    "LatentReasoner",
    "LatentReportCallback",
    "LatentSFTConfig",
    "LatentSFTTrainer",
    "SoftTokenGRPOConfig",
    "SoftTokenGRPOTrainer",
    "ThinkingConfig",
    "ThinkingReasoner",
    "first_layers",
    "fresh_layers",
]

if TYPE_CHECKING:
    from .models import LatentPolicyConfig, LatentPolicyModel, first_layers, fresh_layers
    from .models.thinking import ThinkingConfig
    from .reasoners import LatentReasoner, ThinkingReasoner
    from .report import LatentReportCallback
    from .trainer import (
        CoconutSFTConfig,
        CoconutSFTTrainer,
        LatentGRPOConfig,
        LatentGRPOTrainer,
        LatentSFTConfig,
        LatentSFTTrainer,
        SoftTokenGRPOConfig,
        SoftTokenGRPOTrainer,
    )


def __getattr__(name: str):
    # Importing TRL and transformers takes seconds: only what is asked for
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
