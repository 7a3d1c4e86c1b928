# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .densities import DiagonalGaussian, SoftTokens, StoppedDensity
from .injection import LatentInjector
from .latent_policy import LatentPolicyModel, LatentPolicyOutput
from .latent_policy_config import LatentPolicyConfig
from .main_model import first_layers, fresh_layers, weights_fingerprint


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
