# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Answer questions with a policy.

Examples:

    trl-dlr generate --policy user/policy --prompts "What is 3 + 4?" "What is 5 + 6?"
    trl-dlr generate --policy user/policy --prompts "What is 3 + 4?" --num_samples 8 --selection majority
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..option_docs import described
from .reasoner import ReasonerArguments


QUESTIONS_TOGETHER = 16


@described
@dataclass
class GenerateArguments(ReasonerArguments):
    """
    Arguments of `trl-dlr generate`.

    Args:
        prompts (`list[str]`, *optional*):
            Questions.
        is_chat (`bool`, *optional*, defaults to `True`):
            Whether questions are chat messages. If not, they are the prompts as they stand.
        system_prompt (`str`, *optional*):
            System message.
        num_samples (`int`, *optional*, defaults to `1`):
            Trajectories per question.
        do_sample (`bool`, *optional*):
            Whether latents are sampled. If `None`, when there is more than one.
        selection (`str`, *optional*, defaults to `"first"`):
            Which completion is the answer: `first`, `majority` or `best` (by the value head).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the latents.
        output_json (`str`, *optional*):
            File for all completions and scores.
    """

    prompts: list[str] = field(default_factory=list)
    is_chat: bool = True
    system_prompt: str | None = None
    num_samples: int = 1
    do_sample: bool | None = None
    selection: str = "first"
    seed: int = 0
    output_json: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.prompts:
            raise ValueError("`prompts` must hold at least one question: pass --prompts.")


ARGUMENTS = (GenerateArguments,)


def main(args: GenerateArguments) -> None:
    prompts = [args.prompt(question, args.is_chat, args.system_prompt) for question in args.prompts]
    reasoner, rows = args.load(), []
    settings = {"num_samples": args.num_samples, "do_sample": args.do_sample, "selection": args.selection}
    torch.manual_seed(args.seed)
    for start in range(0, len(prompts), QUESTIONS_TOGETHER):  # so that answers appear as they come
        chunk = slice(start, start + QUESTIONS_TOGETHER)
        answers = reasoner.generate(prompts[chunk], **settings)
        scores = [None] * len(answers.texts) if answers.scores is None else answers.scores.tolist()
        for row in zip(args.prompts[chunk], answers.texts, answers.candidates, scores, strict=True):
            rows.append(dict(zip(("prompt", "text", "candidates", "scores"), row, strict=True)))
            print(f"> {row[0]}\n{row[1]}\n", flush=True)
    if args.output_json is not None:
        Path(args.output_json).write_text(json.dumps(rows, indent=2))
