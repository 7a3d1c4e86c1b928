# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .latent_reasoner import LatentReasoner
from .thinking_reasoner import ThinkingReasoner


__all__ = [
    "LatentReasoner",
    "ThinkingReasoner",
]
