# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""`trl-dlr eval`: a policy on held-out questions over several seeds, beside the controls that say what its latents do."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..evaluation.table import ROWS, evaluate_row, print_table
from ..rewards import correctness_reward
from .arguments import file_loader, load_dataset_split
from .parser import command_parser
from .reasoner import ReasonerArguments


EPILOG = """example:
  trl-dlr eval --policy user/policy --dataset_name test.jsonl --num_questions 200 --num_samples 8

Right is what equals the column `answer` or `solution` as a string, a number or an expression. Read the row `policy`
beside `no_latents` (the main model alone) and `shuffled` (latents of other questions): what shuffling does not cost is
steering, not information about the question."""


@dataclass
class EvalArguments(ReasonerArguments):
    """
    Arguments of `trl-dlr eval`.

    Args:
        dataset_name (`str`, *optional*):
            Hub dataset, or a local file (JSON, JSONL, CSV or Parquet), with a column `prompt`, `question` or `problem`.
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset.
        dataset_split (`str`, *optional*):
            Split, such as `"test[:100]"`. If `None`, `test` of a Hub dataset, all of a file.
        system_prompt (`str`, *optional*):
            System message, for questions without a column `prompt`.
        prompt_template (`str`, *optional*):
            Text with `{question}` in it, for models without a chat template.
        num_questions (`int`, *optional*):
            Questions, the first ones. If `None`, all.
        num_samples (`int`, *optional*, defaults to `4`):
            Trajectories per question.
        k (`int`, *optional*):
            k of pass@k and majority@k. If `None`, `num_samples`.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`):
            Seeds of the latents, a run each.
        rows (`list[str]`, *optional*):
            Rows of the table. If `None`, all: policy, mean_latents, no_latents, plain_anchors, zero_latents, fresh_head,
            shuffled. A model that thinks by itself has neither plain_anchors nor fresh_head.
        batch_size (`int`, *optional*, defaults to `8`):
            Questions decoded together.
        output_json (`str`, *optional*):
            File for all figures.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub dataset, or local JSON, JSONL, CSV or Parquet file; must be set."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split, such as 'test[:100]'."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message for questions."})
    prompt_template: str | None = field(default=None, metadata={"help": "Text with {question}, instead of a chat."})
    num_questions: int | None = field(default=None, metadata={"help": "Questions, the first ones; by default all."})
    num_samples: int = field(default=4, metadata={"help": "Trajectories per question."})
    k: int | None = field(default=None, metadata={"help": "k of pass@k and majority@k; by default all samples."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the latents."})
    rows: list[str] | None = field(default=None, metadata={"help": "Rows of the table; by default all there are."})
    batch_size: int = field(default=8, metadata={"help": "Questions decoded together."})
    output_json: str | None = field(default=None, metadata={"help": "File for all figures."})

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is None:
            raise ValueError("`dataset_name` must be set: pass --dataset_name with a Hub dataset or a JSONL file.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must be at least one number, none of them twice, got {self.seeds}.")
        if self.rows is not None and (not self.rows or not set(self.rows) <= set(ROWS)):
            raise ValueError(f"`rows` must be some of {', '.join(ROWS)}, got {self.rows}.")
        self.k = self.num_samples if self.k is None else self.k
        if not 1 <= self.k <= self.num_samples:
            raise ValueError(f"`k` must be between 1 and `num_samples={self.num_samples}`, got {self.k}.")


def main(args: EvalArguments) -> None:
    split = args.dataset_split or ("test" if file_loader(args.dataset_name) is None else "train")
    questions = args.dataset_name, args.dataset_config, split, args.system_prompt, args.prompt_template
    dataset = load_dataset_split(*questions)
    if args.num_questions is not None:
        dataset = dataset.select(range(min(args.num_questions, len(dataset))))
    reasoner = args.load()
    settings = args.seeds, args.num_samples, args.k, args.batch_size
    rows = args.rows or [row for row, latents in ROWS.items() if latents in reasoner.controls]
    results = {row: evaluate_row(reasoner, dataset, correctness_reward, ROWS[row], row, *settings) for row in rows}
    print_table(results)
    if args.output_json is not None:
        figures = {"settings": {**asdict(args), "num_questions": len(dataset)}, "results": results}
        Path(args.output_json).write_text(json.dumps(figures, indent=2) + "\n")


def run(argv: list[str], prog: str) -> None:
    parser = command_parser((EvalArguments,), prog, __doc__, EPILOG)
    main(*parser.parse_args_and_config(argv))
