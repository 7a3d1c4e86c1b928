# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .engine import DecodingEngine
from .prompts import tokenize_prompts
from .transformers_engine import TransformersEngine


__all__ = ["DecodingEngine", "TransformersEngine", "tokenize_prompts"]
