# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Tokens of an answer as text that can be sent: no half characters, and nothing of a text that ends it."""

from ..generation import DecodingEngine


class AnswerText:
    """
    Text of one answer, which comes token by token.

    Args:
        engine ([`DecodingEngine`]):
            What decodes tokens.
        stop_strings (`list[str]`):
            Texts that end the answer, and are not part of it.
    """

    def __init__(self, engine: DecodingEngine, stop_strings: list[str]):
        self.engine = engine
        self.stop_strings = stop_strings
        self.token_ids: list[int] = []
        self.text = ""  # what can be sent of it
        self.finish_reason = "length"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def add(self, token_ids: list[int], is_last: bool) -> str:
        """The text that further tokens add; what may still change is kept until the last."""
        self.token_ids += token_ids
        text = self.engine.decode([self.token_ids])[0]
        found = [place for stop in self.stop_strings if (place := text.find(stop)) >= 0]
        if found:
            text = text[: min(found)]
            self.finish_reason = "stop"
        elif is_last:
            if self.token_ids and self.token_ids[-1] in self.engine.eos_token_ids:
                self.finish_reason = "stop"
        else:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - max((_overlap(text, stop) for stop in self.stop_strings), default=0)]
        if not text.startswith(self.text):  # a tokenizer that changes what stood before; the rest comes at the end
            if not is_last:
                return ""
            text = self.text + text[len(self.text) :]
        piece, self.text = text[len(self.text) :], text
        return piece


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that may be the beginning of a stop string."""
    return next((length for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])), 0)
