# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Docstrings in TRL's format, as griffe reads Google's: for the reference page of the site."""

import re
from pathlib import Path

import griffe


PAGE = (Path(__file__).parents[1] / "reference.md").read_text()
LINKS = {path.rpartition(".")[2]: path for path in re.findall(r"^::: (\S+)", PAGE, flags=re.MULTILINE)}
REFERENCE = re.compile(r"\[`~?((?:[a-z_]+\.)*)([\w.]+)`\](?!\()")  # [`~rewards.correctness_reward`]


def link(reference: re.Match) -> str:
    """A reference to what is on the page is a link, and any other the name without its module."""
    name = reference[2]
    return f"[`{name}`][{LINKS[name]}]" if name in LINKS else f"`{name}`"


def plain(kind: re.Match) -> str:
    """The type of what is returned or raised, which griffe reads as Python."""
    text = REFERENCE.sub(r"\2", kind[0]).replace("`", "")
    return re.sub(r"of shape \((.*)\)", r"of shape [\1]", text)  # griffe takes parentheses off


def as_google(docstring: str) -> str:
    # A quoted line among parameters begins a section of its own
    text = re.sub(r"^( *)    > (.+)\n+", r"\1Parameters: \2\n", docstring, flags=re.MULTILINE)
    text = re.sub(r"^( *(?:Parameters|Args):\n)\s*(?= *Parameters: )", "", text, flags=re.MULTILINE)
    # The first colon of an entry ends its type: one within a default is another sign, which the template puts back
    text = re.sub(r"(?<=defaults to `)[^`\n]+", lambda default: default[0].replace(":", "\ua789"), text)
    parts = re.split(r"^((?:Attributes|Returns|Yields|Raises):\n)", text, flags=re.MULTILINE)
    for index in range(2, len(parts), 2):
        if parts[index - 1] == "Attributes:\n":
            parts[index] = re.sub(r"^ {4}\w+ \(.*\):$", plain, parts[index], flags=re.MULTILINE)
        elif parts[index - 1] == "Raises:\n":  # an entry a line
            parts[index] = re.sub(r"\n {4}(?!`[^:\n]+: )(?=\S)", " ", parts[index])
            parts[index] = re.sub(r"^ {4}\S[^:\n]*(?=:)", plain, parts[index], flags=re.MULTILINE)
        else:
            parts[index] = re.sub(
                r"\A {4}\S[^:\n]*", plain, re.sub(r"^ {8}", " " * 4, parts[index], flags=re.MULTILINE)
            )
            parts[index] = re.sub(r"\A(.*):\n +", r"\1: ", parts[index])
    return REFERENCE.sub(link, "".join(parts))


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_google(obj.docstring.value)
