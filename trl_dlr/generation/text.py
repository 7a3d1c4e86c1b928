# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Prompts as tokens, up to where the answer begins, and completions as text."""

import bisect
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria
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


def control_ids(processing_class: PreTrainedTokenizerBase, eos_token_ids: list[int]) -> set[int]:
    """Tokens that say where a text ends or is padded, and are no part of it."""
    names = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    return {*eos_token_ids, *(getattr(processing_class, f"{name}_token_id") for name in names)} - {None}


def decode_completions(
    completion_ids: list[list[int]], processing_class: PreTrainedTokenizerBase, eos_token_ids: list[int]
) -> list[str]:
    """
    Completions as the text that reward functions and users read. Special tokens are part of it, as answer tags may be
    among them, but for those of [`control_ids`].

    Args:
        completion_ids (`list[list[int]]`):
            Tokens of each completion.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        eos_token_ids (`list[int]`):
            Tokens that end a completion.
    """
    control = control_ids(processing_class, eos_token_ids)
    kept = [[token for token in ids if token not in control] for ids in completion_ids]
    return processing_class.batch_decode(kept, skip_special_tokens=False)


def as_completions(texts: list[str], prompts: list) -> list:
    """Completions in the form of their prompts, as TRL hands them to reward functions."""
    if is_conversational({"prompt": prompts[0]}):
        return [[{"role": "assistant", "content": text}] for text in texts]
    return texts


class StopStrings(StoppingCriteria):
    """
    Texts that end a completion. The token that completes one is a completion's last.

    Args:
        stop_strings (`str` or `list[str]`):
            The texts.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of what is written.
    """

    def __init__(self, stop_strings: str | list[str], processing_class: PreTrainedTokenizerBase):
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not self.stop_strings or not all(isinstance(text, str) and text for text in self.stop_strings):
            raise ValueError(f"`stop_strings` must be at least one text that is not empty, got {stop_strings!r}.")
        self.processing_class = processing_class
        # A token may stand for a byte; a first one may lose its space
        self._num_last = max(len(text.encode()) for text in self.stop_strings) + 2

    def are_in(self, ids: list[int]) -> bool:
        """Whether tokens hold one."""
        text = self.processing_class.decode(ids, skip_special_tokens=False)
        return any(stop in text for stop in self.stop_strings)

    def cut(self, ids: list[int]) -> list[int]:
        """Tokens up to the one that completes the first of them; all, if there is none."""
        if not self.are_in(ids):
            return ids
        return ids[: 1 + bisect.bisect_left(range(1, len(ids)), True, key=lambda length: self.are_in(ids[:length]))]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.Tensor:
        """Which rows, of shape `(batch_size, length)`, the latest token has ended."""
        last = input_ids[:, -self._num_last :].tolist()
        is_in = [self.are_in(tail) and self.are_in(ids) for tail, ids in zip(last, input_ids.tolist(), strict=True)]
        return torch.tensor(is_in, device=input_ids.device)
