# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Write the page with a run's plots again, with the held-out metrics that are there by now. The run must have been
trained with a LatentReportCallback, as `trl-dlr train --report true` does.

Examples:

    trl-dlr report --output_dir outputs/demo
"""

from dataclasses import dataclass

from ..option_docs import described
from ..report.page import write_report


@described
@dataclass
class ReportArguments:
    """
    Arguments of `trl-dlr report`.

    Args:
        output_dir (`str`, *optional*):
            Folder of the run.
        with_eval_results (`bool`, *optional*, defaults to `True`):
            Whether to put the metrics of its `eval_results.json` on the page.
    """

    output_dir: str | None = None
    with_eval_results: bool = True

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("`output_dir` must be set: pass --output_dir with the folder of a run.")


ARGUMENTS = (ReportArguments,)


def main(args: ReportArguments) -> None:
    print(write_report(args.output_dir, with_eval_results=args.with_eval_results))
