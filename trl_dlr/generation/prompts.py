# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Prompts as tokens, up to where the answer begins."""

from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational


def tokenize_prompts(
    prompts: list, processing_class: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """
    Token ids of standard or conversational prompts, the latter rendered with the generation prompt.

    Args:
        prompts (`list`):
            Prompts, all of one kind.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, with a chat template if the prompts are conversational.
        chat_template_kwargs (`dict`, *optional*):
            Keyword arguments for the chat template.
    """
    if is_conversational({"prompt": prompts[0]}):
        return processing_class.apply_chat_template(
            prompts, add_generation_prompt=True, return_dict=True, **(chat_template_kwargs or {})
        )["input_ids"]
    return processing_class(text=prompts)["input_ids"]
