# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Where in a completion its answer stands, in time proportional to its length."""

import re
from typing import Any

from .reading import SENTENCE_END, is_math, letter, normalize, quantity


MAX_PLACES = 20  # that are tried: of more, none is an answer
NEXT_QUESTION = re.compile(  # a base model that has answered goes on with a question of its own
    r"(<\|[^|>\s]{1,40}\|>|</?s>|<(?:pad|eos|end_of_turn)>|\[/?INST\]"
    r"|\n[ \t*#_>]*(?:(?:next )?question|problem|q|user|human|instruction)[ \t]*\d{0,3}[*_]*[:\n]"
    r"|(?:(?:\A1|\n[ \t]*\d{1,2})[.)][ \t]+)?\b(?:what|how|which|who|where)\b[^.?!\n]{0,300}\?)",
    re.IGNORECASE,
)
FIRST_PART = re.compile(r"\n\s*\n|\s(?=Explanation:)")
GSM8K_MARK = re.compile(r"####+[ \t]*\n?((?:(?!####)[^\n])*)")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BETWEEN_BOXES = re.compile(r"[\s$,;.]*(?:and[\s$,;]*)?")
WORDS = re.compile(
    r"(?<!\bif the )(?<!assume the )(?<!suppose the )\b(?:answer|correct (?:choice|option))\b(?:(?!because)[^\n.:=]){0,60}?"
    r"(?:\b(?:is|are|was|equals|(?:should|would|must) be)\b|[:=]|\s[-–]\s|(?<=final answer)[*_]*\n)"
    r"(?:[\s:*_$]|\\[\[(])*(?=[^\s:*_$])(?!not\b)",
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
    The part of `text` that states the answer. A thought (`<think>`) does not. Of what follows it, that is the inside
    of the last `<answer>`, closed or not; in it, or else in all, what follows the first GSM8K `####` that has an
    answer on its line; the inside of the last `\boxed{}`; what follows the last "the answer is". Without such marks it
    is the first paragraph if that is a number or a letter, or else all. Where a completion goes on with another
    question, its first answer counts; a text before a question that is no answer is part of the question.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    segments = NEXT_QUESTION.split(text.strip(), MAX_PLACES)  # and what stands between them
    unmarked, is_numbered = "", False  # by himself, who has begun with a number
    for segment, question in zip(map(str.strip, segments[::2]), [*segments[1::2], ""], strict=True):
        marked = _marked(segment)
        if marked is not None:
            if marked.strip() or not question:
                return marked.strip()
            continue  # tags without anything in them belong to the question
        first = FIRST_PART.split(segment, 1)[0]
        read = normalize(first) if question or first != segment else ""
        is_asked = question.endswith("?") and (is_numbered or question[0] != "\n")  # rather than the next of a list
        is_numbered = is_numbered or (is_asked and question[0].isdigit())
        is_short = question and not is_asked and 0 < len(read.split()) <= 3
        if letter(read) or quantity(read) or is_short or (question and not is_asked and is_math(read)):
            unmarked = unmarked or first
            if not is_asked:  # else a mark that follows counts more: one may ask himself
                return unmarked
        unmarked = unmarked or ("" if is_asked and not is_math(read) else segment)
    return unmarked


def _marked(text: str) -> str | None:
    marked = None
    for find in (_in_tag, _after_mark, _in_box, _after_words):
        found = find(text if marked is None else marked)
        marked = marked if found is None else found
    return marked


def _in_tag(text: str) -> str | None:
    before, *insides = re.split("<answer>", text, flags=re.IGNORECASE)
    if not insides:  # the prompt may have opened it
        return before.partition("</answer>")[0] if "</answer>" in before else None
    for inside in reversed(insides):
        inside, closed, _ = inside.partition("</answer>")
        inside = inside if closed else inside.strip().partition("\n")[0].partition("<")[0]  # cut off, or run on
        if inside.strip():
            return inside
    return ""


def _after_mark(text: str) -> str | None:
    text = text.rstrip()
    for index, mark in enumerate(GSM8K_MARK.finditer(text)):
        line = normalize(mark[1]) if index < MAX_PLACES else ""
        # Others are headings: "#### Conclusion", "#### 1. Add the pens"
        if mark[1].strip() and (mark.end() == len(text) or quantity(line) or is_math(line)):
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
    starts = [said.end() for said in WORDS.finditer(text)]
    if not starts:
        return None
    end = SENTENCE_END.search(text, starts[-1])
    return text[starts[-1] : end.end() if end else None]
