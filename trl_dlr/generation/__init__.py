# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .engine import DecodingEngine
from .text import tokenize_prompts
from .transformers_engine import TransformersEngine
from .vllm_engine import VLLMEngine
from .vllm_server_engine import VLLMServerEngine


__all__ = ["DecodingEngine", "TransformersEngine", "VLLMEngine", "VLLMServerEngine", "tokenize_prompts"]
