# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Ask a policy question after question; answers appear as they are written.

Examples:

    trl-dlr chat --policy user/policy
"""

import sys
from dataclasses import dataclass

from ..option_docs import described
from .reasoner import ReasonerArguments


INTRODUCTION = (
    "Policies are trained on single questions, so each one is asked on its own. An empty line or Ctrl-D ends the chat."
)


@described
@dataclass
class ChatArguments(ReasonerArguments):
    """
    Arguments of `trl-dlr chat`.

    Args:
        is_chat (`bool`, *optional*, defaults to `True`):
            Whether questions are chat messages. If not, they are the prompts as they stand.
        system_prompt (`str`, *optional*):
            System message.
        do_sample (`bool`, *optional*, defaults to `False`):
            Whether latents are sampled.
    """

    is_chat: bool = True
    system_prompt: str | None = None
    do_sample: bool = False


ARGUMENTS = (ChatArguments,)


def main(args: ChatArguments) -> None:
    reasoner = args.load()
    print(INTRODUCTION)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        prompt = args.prompt(question, args.is_chat, args.system_prompt)
        for piece in reasoner.stream(prompt, do_sample=args.do_sample):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
