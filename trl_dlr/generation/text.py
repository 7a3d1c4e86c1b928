# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Prompts as tokens, up to where the answer begins, and completions as text."""

import bisect
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from trl.data_utils import is_conversational


def check_tokenizers(**processing_classes: Any) -> None:
    """Refuse what was given as a tokenizer and is none, by the name of the argument that gave it."""
    for name, value in processing_classes.items():
        if value is not None and not isinstance(value, PreTrainedTokenizerBase):
            raise ValueError(f"`{name}` must be a tokenizer, got {type(value).__name__}.")


def check_prompts(prompts: Iterable, name: str) -> None:
    """
    Refuse prompts that can be neither tokenized nor rendered, and two kinds of them.

    Args:
        prompts (`Iterable`):
            What was given as prompts.
        name (`str`):
            What has them, in messages.
    """
    first = None
    for index, prompt in enumerate(prompts):
        first = prompt if first is None else first
        found = what_is_wrong_with(prompt)
        if found is None and isinstance(prompt, str) != isinstance(first, str):
            found = "is of another kind than the first", "Give texts alone or lists of messages alone"
        if found is not None:
            problem, remedy = found
            raise ValueError(
                f"{name} has a prompt at index {index} that {problem}, got {str(prompt)[:200]!r}. {remedy}."
            )


def what_is_wrong_with(prompt: Any) -> tuple[str, str] | None:
    """Why a prompt can be neither tokenized nor rendered, and what to do, or `None` if it can."""
    empty = "is empty", "Leave it out"
    if isinstance(prompt, str):
        return None if prompt.strip() else empty
    if not isinstance(prompt, list):
        return f"is a {type(prompt).__name__}", "Give a text or a list of messages"
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "is no list of messages", "Give each of them a 'role' and a 'content', or give a text"
        content = message.get("content")
        if isinstance(content, list):
            return "has a list of parts as 'content'", "Join their texts into one: only text is read"
        if not isinstance(content, str) and not message.get("tool_calls"):
            return f"has a {type(content).__name__} as 'content'", "Give a text"
    return None if any((message.get("content") or "").strip() for message in prompt) else empty


def tokenize_prompts(
    prompts: list, processing_class: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """
    Token ids of standard or conversational prompts, the latter rendered with the generation prompt.

    Args:
        prompts (`list`):
            Prompts, at least one and all of one kind. What is no prompt is refused, see [`check_prompts`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, with a chat template if the prompts are conversational.
        chat_template_kwargs (`dict`, *optional*):
            Keyword arguments for the chat template.
    """
    check_prompts(prompts, "`prompts`")
    if is_conversational({"prompt": prompts[0]}):
        if processing_class.chat_template is None:
            raise ValueError(
                "`prompts` are conversations, but the tokenizer has no chat template. Give texts (`--is_chat false` of "
                "a command), or set the tokenizer's `chat_template`."
            )
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
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
        is_list = isinstance(self.stop_strings, (list, tuple)) and len(self.stop_strings) > 0
        if not is_list or not all(isinstance(text, str) and text for text in self.stop_strings):
            raise ValueError(f"`stop_strings` must be at least one text that is not empty, got {stop_strings!r}.")
        self.processing_class = processing_class
        # A token may stand for a byte; a first one may lose its space
        self._num_last = max(len(text.encode()) for text in self.stop_strings) + 2

    def are_in(self, ids: list[int]) -> bool:
        """Whether tokens hold one."""
        text = self.processing_class.decode(ids, skip_special_tokens=False)
        return any(stop in text for stop in self.stop_strings)

    def are_at_the_end(self, ids: list[int]) -> bool:
        """Whether tokens hold one that their last token may have completed."""
        return self.are_in(ids[-self._num_last :]) and self.are_in(ids)

    def cut(self, ids: list[int]) -> list[int]:
        """Tokens up to the one that completes the first of them; all, if there is none."""
        if not self.are_in(ids):
            return ids
        return ids[: 1 + bisect.bisect_left(range(1, len(ids)), True, key=lambda length: self.are_in(ids[:length]))]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.Tensor:
        """Which rows, of shape `(batch_size, length)`, the latest token has ended."""
        return torch.tensor([self.are_at_the_end(ids) for ids in input_ids.tolist()], device=input_ids.device)
