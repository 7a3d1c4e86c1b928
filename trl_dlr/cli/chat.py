# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""`trl-dlr chat`: ask a policy question after question; answers appear as they are written."""

import sys
from dataclasses import dataclass, field

from .parser import command_parser
from .reasoner import ReasonerArguments


EPILOG = (
    "Policies are trained on single questions, so each one is asked on its own. An empty line or Ctrl-D ends the chat."
)


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

    is_chat: bool = field(default=True, metadata={"help": "Questions are chat messages; false: plain prompts."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message."})
    do_sample: bool = field(default=False, metadata={"help": "Whether latents are sampled."})


def main(args: ChatArguments) -> None:
    reasoner = args.load()
    print(EPILOG)
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


def run(argv: list[str], prog: str) -> None:
    parser = command_parser((ChatArguments,), prog, __doc__, EPILOG)
    main(*parser.parse_args_and_config(argv))
