# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Measure a policy on held-out questions over several seeds, beside the controls that say what its latents do.

Examples:

    trl-dlr eval --policy user/policy --dataset_name test.jsonl --num_eval_questions 200 --num_eval_samples 8
    trl-dlr eval --policy outputs/demo --dataset_name addition

Right is what equals the column `answer` or `solution` as a string, a number or an expression. Read the row `policy`
beside `no_latents` (the main model alone) and `shuffled` (latents of other questions): what shuffling does not cost is
steering, not information about the question.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator

from ..cli.launch import run_script
from ..cli.reasoner import ReasonerArguments
from ..evaluation.controls import CONTROLS
from ..evaluation.table import evaluate_row, print_table
from ..option_docs import described
from ..trainer.arguments import without_secrets
from .questions import QuestionArguments, load_test_questions


@described
@dataclass
class EvalArguments(ReasonerArguments, QuestionArguments):
    """
    Arguments of `trl-dlr eval`.

    Args:
        k (`int`, *optional*):
            k of pass@k and majority@k. If unset, `num_eval_samples`.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`):
            Seeds of the latents, a run each. What does not depend on them runs once.
        controls (`list[str]`, *optional*):
            Rows of the table: policy, mean_latents, no_latents, plain_anchors, zero_latents, fresh_head, shuffled. If
            unset, all that there are; a model that thinks by itself has neither plain_anchors nor fresh_head.
        output_json (`str`, *optional*):
            File for all metrics.
    """

    k: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    controls: list[str] | None = None
    output_json: str | None = None

    def __post_init__(self):
        ReasonerArguments.__post_init__(self)
        QuestionArguments.__post_init__(self)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must be at least one number, none of them twice, got {self.seeds}.")
        if self.controls is not None and (not self.controls or not set(self.controls) <= set(CONTROLS)):
            raise ValueError(f"`controls` must be some of {', '.join(CONTROLS)}, got {self.controls}.")
        self.k = self.num_eval_samples if self.k is None else self.k
        if not 1 <= self.k <= self.num_eval_samples:
            raise ValueError(f"`k` must be between 1 and `num_eval_samples={self.num_eval_samples}`, got {self.k}.")


ARGUMENTS = (EvalArguments,)


def main(args: EvalArguments) -> None:
    accelerator = Accelerator()  # knows of processes on CPUs, which `PartialState` by itself would not
    dataset, judge = load_test_questions(args)
    args.device = args.device or str(accelerator.device)
    reasoner, results = args.load(), {}
    if unknown := set(args.controls or ()) - set(reasoner.controls):
        raise ValueError(
            f"`controls` must be some of {', '.join(reasoner.controls)} for this policy, got {', '.join(sorted(unknown))}."
        )
    for control in args.controls or reasoner.controls:
        results[control] = evaluate_row(
            reasoner,
            dataset,
            judge,
            control=control,
            seeds=args.seeds,
            num_samples=args.num_eval_samples,
            k=args.k,
            batch_size=args.eval_batch_questions,
        )
    if accelerator.is_main_process:
        print_table(results)
    if args.output_json is not None and accelerator.is_main_process:
        content = {
            "settings": {**without_secrets(asdict(args)), "num_eval_questions": len(dataset)},
            "results": results,
        }
        Path(args.output_json).write_text(json.dumps(content, indent=2) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    run_script("eval", main, ARGUMENTS)
