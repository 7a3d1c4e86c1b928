# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""`trl-dlr report`: write the page with a run's plots again, with the held-out figures that are there by now."""

from dataclasses import dataclass, field

from ..report.page import write_report
from .parser import command_parser


EPILOG = """example:
  trl-dlr report --output_dir outputs/demo

The run must have been trained with a LatentReportCallback, as `trl-dlr train --report true` and the examples do."""


@dataclass
class ReportArguments:
    """
    Arguments of `trl-dlr report`.

    Args:
        output_dir (`str`, *optional*):
            Folder of the run.
        with_eval_results (`bool`, *optional*, defaults to `True`):
            Whether to put the figures of its `eval_results.json` on the page.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run; must be set."})
    with_eval_results: bool = field(default=True, metadata={"help": "Use the figures of eval_results.json."})

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("`output_dir` must be set: pass --output_dir with the folder of a run.")


def run(argv: list[str], prog: str) -> None:
    parser = command_parser((ReportArguments,), prog, __doc__, EPILOG)
    (args,) = parser.parse_args_and_config(argv)
    print(write_report(args.output_dir, with_eval_results=args.with_eval_results))
