# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Training commands, launched through accelerate."""

import sys
from collections.abc import Callable
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser
from trl import TrlParser

from .main import report_error


EPILOG = """example:
  %(prog)s --config run.yaml --learning_rate 1e-4 --num_processes 8

`main_model_name_or_path`, `dataset_name` and either `model_name_or_path` (`first_layers` or `fresh_layers` of the main
model, a Hub id or a folder) or `policy` must be given. `--config` names a YAML file of any of these arguments; those on
the command line come first. Arguments of `accelerate launch` can be given as well (--num_processes, --config_file)."""


def launch(module: str, parser: TrlParser, argv: list[str]) -> int:
    """
    Run the script that a module is under `accelerate launch`.

    Args:
        module (`str`):
            Name of the module.
        parser ([`~trl.TrlParser`]):
            Its arguments, which are checked here first: a wrong one is told once, not by every process. What it does not
            know goes to `accelerate launch`.
        argv (`list[str]`):
            Arguments.

    Returns:
        `int`: exit code.
    """
    *_, of_config, of_cli = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    own, unknown = [], list(of_cli)
    for argument in argv:  # `of_cli` holds, in order, those that are not the script's
        if unknown and argument == unknown[0]:
            unknown.pop(0)
        else:
            own.append(argument)
    accelerate_parser = launch_command_parser()
    accelerate_parser.prog, accelerate_parser.usage = parser.prog, parser.usage  # it tells what neither of them knows
    # Quiet: the script has said in one line what went wrong
    arguments = accelerate_parser.parse_args(["--quiet", "--module", *of_config, *of_cli, module, *own])
    try:
        launch_command(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def run_script(command: str, main: Callable[..., None], parser: TrlParser) -> None:
    """What a launched process does: parse, run, and end with an exit code."""
    sys.path.insert(0, str(Path.cwd()))  # reward functions of the user's, by import path
    try:
        main(*parser.parse_args_and_config(fail_with_unknown_args=False)[: len(parser.dataclass_types)])
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report_error(command, error))
