# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Where in a completion its answer stands, in time proportional to its length."""

import re
from collections import deque
from typing import Any

from .reading import SENTENCE_END, is_math, normalize, quantity


NEXT_QUESTION = re.compile(  # a base model that has answered goes on with a question of its own
    r"<\|[^|>\s]{1,40}\|>|</s>|<eos>|<end_of_turn>"
    r"|\n[ \t*#_>]*(?:(?:next )?question|problem|exercise|q|user|human|instruction)[ \t]*\d{0,3}[*_]*:",
    re.IGNORECASE,
)
ANSWER_TAG = re.compile(r"<answer>([^<]*(?:<(?!/?answer>)[^<]*)*)(?=(</?answer>)?)", re.IGNORECASE)
GSM8K_MARK = re.compile(r"####+[ \t]*\n?((?:(?!####)[^\n])*)")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BETWEEN_BOXES = re.compile(r"[\s$,;.]*(?:and|or)?[\s$,;]*")
WORDS = re.compile(
    r"\banswer\b[^\n.:=]{0,60}?(?:\b(?:is|are|was|equals|(?:would|should|must|will) be)\b|[:=]|\s[-–]\s|(?<=final answer)[*_]*\n)"
    r"[\s:*_]*",
    re.IGNORECASE,
)


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text that a completion ends with: empty if a conversation does not end with the assistant's text."""
    if isinstance(completion, str):
        return completion
    if not completion or completion[-1].get("role", "assistant") != "assistant":
        return ""
    content = completion[-1].get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def extract_answer(text: str) -> str:
    r"""
    The part of `text` that states the answer. Of what follows a thought (`</think>`), that is the inside of the last
    `<answer>`, closed or not; in it, or else in all, what follows the first GSM8K `####` that has an answer on its line;
    the inside of the last `\boxed{}`; what follows the last "the answer is". Where a completion goes on with another
    question, its first answer counts.
    """
    segments = [part for part in NEXT_QUESTION.split(text.rpartition("</think>")[2]) if part.strip()]
    for segment in segments:
        marked = None
        for find in (_in_tag, _after_mark, _in_box, _after_words):
            found = find(segment if marked is None else marked)
            marked = marked if found is None else found
        if marked is not None:
            return marked.strip()
    return segments[0].strip() if segments else ""


def _in_tag(text: str) -> str | None:
    insides = [
        inside if closed else inside.strip().partition("\n")[0].partition("<")[0]  # cut off, or run on
        for inside, closed in ANSWER_TAG.findall(text)
    ]
    return next((inside for inside in reversed(insides) if inside.strip()), "") if insides else None


def _after_mark(text: str) -> str | None:
    text = text.rstrip()
    for number, mark in enumerate(GSM8K_MARK.finditer(text)):
        line = normalize(mark[1]) if number < 20 else ""  # more are no answers
        # Others are headings: "#### Conclusion", "#### 1. Add the pens"
        if mark[1].strip() and (mark.end() == len(text) or quantity(line) is not None or is_math(line)):
            return mark[1]
    return None


def _in_box(text: str) -> str | None:
    boxes = []  # the last one, and those in a row with it
    for mark in reversed(list(BOX.finditer(text))[-8:]):
        depth, end = 1, mark.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if boxes and (end > boxes[0][0] or not BETWEEN_BOXES.fullmatch(text[end : boxes[0][0]])):
            break
        boxes.insert(0, (mark.start(), text[mark.end() : end - (depth == 0)]))
    return ", ".join(dict.fromkeys(content for _, content in boxes)) if boxes else None


def _after_words(text: str) -> str | None:
    said = deque(WORDS.finditer(text), maxlen=1)
    if not said:
        return None
    start = said[0].end()
    end = SENTENCE_END.search(text, start)
    return text[start : end.end() if end else None].rstrip("!")
