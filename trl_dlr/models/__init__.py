# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .assistants import first_layers, fresh_layers
from .distributions import DiagonalGaussian, SoftTokens, StoppedDensity
from .fingerprint import weights_fingerprint
from .injection import LatentInjector
from .latent_policy import LatentPolicyModel, LatentPolicyOutput
from .latent_policy_config import LatentPolicyConfig


__all__ = [
    "DiagonalGaussian",
    "LatentInjector",
    "LatentPolicyConfig",
    "LatentPolicyModel",
    "LatentPolicyOutput",
    "SoftTokens",
    "StoppedDensity",
    "first_layers",
    "fresh_layers",
    "weights_fingerprint",
]
