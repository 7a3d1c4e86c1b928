# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .controls import evaluate_latents


__all__ = ["evaluate_latents"]
