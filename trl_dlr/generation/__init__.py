# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .engine import DecodingEngine
from .text import tokenize_prompts
from .transformers_engine import TransformersEngine
from .vllm_engine import VLLMEngine
from .vllm_server_engine import VLLMServerEngine
from .vllm_servers_engine import VLLMServersEngine


__all__ = [
    "DecodingEngine",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "VLLMServersEngine",
    "check_engine_name",
    "create_engine",
    "tokenize_prompts",
]


def check_engine_name(engine: str) -> None:
    """Refuse what names no engine, see [`create_engine`]."""
    if engine not in ("transformers", "vllm") and not engine.startswith(("http://", "https://")):
        raise ValueError(f"`engine` must be 'transformers', 'vllm' or the URL of a vLLM server, got {engine!r}.")


def create_engine(
    engine: str,
    main_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    max_new_tokens: int,
    generation_kwargs: dict[str, Any] | None = None,
    **kwargs,
) -> DecodingEngine:
    """
    What decodes a main model's answers, by its name.

    Args:
        engine (`str`):
            `"transformers"`, `"vllm"` (in this process) or the URL of a vLLM server, or several with commas between
            them.
        main_model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        max_new_tokens (`int`):
            Completion tokens at most.
        generation_kwargs (`dict`, *optional*):
            Further fields of [`~transformers.GenerationConfig`], or of `vllm.SamplingParams`. Decoding is greedy
            unless they say otherwise.
        **kwargs:
            Further arguments of [`TransformersEngine`], [`VLLMEngine`], [`VLLMServerEngine`] or
            [`VLLMServersEngine`].
    """
    check_engine_name(engine)
    engine_class = {"transformers": TransformersEngine, "vllm": VLLMEngine}.get(engine)
    if engine_class is None:
        urls = [url.strip() for url in engine.split(",")]
        engine_class = VLLMServerEngine if len(urls) == 1 else VLLMServersEngine
        kwargs |= {"base_url": urls[0]} if len(urls) == 1 else {"base_urls": urls}
    return engine_class(main_model, processing_class, max_new_tokens, generation_kwargs, **kwargs)
