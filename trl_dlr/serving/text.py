# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Tokens of an answer as text that can be sent: no half characters, and nothing of a text that ends it."""

from ..generation import DecodingEngine
from ..generation.text import StopStrings


class AnswerText:
    """
    Text of one answer, which comes token by token.

    Args:
        engine ([`DecodingEngine`]):
            What decodes tokens.
        stop_strings (`list[str]`):
            Texts that end the answer, and are not part of it.

    Attributes:
        text (`str`):
            What can be sent so far.
        finish_reason (`str`, *optional*):
            How it ended, once it has: `"stop"` or `"length"`.
    """

    def __init__(self, engine: DecodingEngine, stop_strings: list[str]):
        self.engine = engine
        self.stop_strings = stop_strings
        self.text = ""
        self.finish_reason: str | None = None
        self._token_ids: list[int] = []
        self._read = ""  # text of the tokens that make whole characters, kept back for stop strings included
        self._start, self._end = 0, 0  # tokens whose text is known, the last ones of which the next are decoded with

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def add(self, token_ids: list[int], is_last: bool) -> str:
        """The text that further tokens add. What may still change is kept until the last one."""
        self._token_ids += token_ids
        if is_last:
            text = self.engine.decode([self._token_ids])[0]
        else:
            text = self._read = self._read + self._newly_read()
        found = [place for stop in self.stop_strings if (place := text.find(stop)) >= 0]
        if found:
            text = text[: min(found)]
        elif not is_last:
            text = text[: len(text) - max((_overlap(text, stop) for stop in self.stop_strings), default=0)]
        if is_last:
            self.finish_reason = "stop" if found or self._is_over() else "length"
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _is_over(self) -> bool:
        """Whether the tokens say so: those that end a text, or a stop string with tokens that are no part of a text."""
        if self._token_ids and self._token_ids[-1] in self.engine.eos_token_ids:
            return True
        return bool(self.stop_strings) and StopStrings(self.stop_strings, self.engine.processing_class).are_in(
            self._token_ids
        )

    def _newly_read(self) -> str:
        """Text of the latest tokens: what they add to the few before them, once they make whole characters."""
        before, now = self.engine.decode([self._token_ids[self._start : self._end], self._token_ids[self._start :]])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._start, self._end = self._end, len(self._token_ids)
        return now[len(before) :]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that may be the beginning of a stop string."""
    tail = text[max(len(text) - len(stop) + 1, 0) :]
    start = tail.find(stop[0])
    while start >= 0 and not stop.startswith(tail[start:]):
        start = tail.find(stop[0], start + 1)
    return len(tail) - start if start >= 0 else 0
