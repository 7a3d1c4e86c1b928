# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Training commands, launched through accelerate."""

import logging
import os
import sys
from collections.abc import Callable

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser

from .main import report_error
from .parser import CommandParser


EPILOG = """example:
  %(prog)s --config run.yaml --learning_rate 1e-4 --num_processes 8

`main_model_name_or_path`, `dataset_name` and either `model_name_or_path` (`first_layers` or `fresh_layers` of the main
model, a Hub id or a folder) or `policy` must be given. `--config` names a YAML file of any of these arguments; those on
the command line come first. Arguments of `accelerate launch` can be given as well (--num_processes, --config_file)."""


def launch(module: str, parser: CommandParser, argv: list[str]) -> int:
    """
    Run the script that a module is under `accelerate launch`.

    Args:
        module (`str`):
            Name of the module.
        parser ([`CommandParser`]):
            Its arguments, which are checked here first: a wrong one is told once, not by every process. What it does not
            know goes to `accelerate launch`.
        argv (`list[str]`):
            Arguments.

    Returns:
        `int`: exit code.
    """
    accelerate_parser = launch_command_parser()
    parser.others = (accelerate_parser,)
    *_, of_config, of_cli = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    own, unknown = [], list(of_cli)
    for argument in argv:  # `of_cli` holds, in order, those that are not the script's
        if unknown and argument == unknown[0]:
            unknown.pop(0)
        else:
            own.append(argument)
    accelerate_parser.prog, accelerate_parser.usage = parser.prog, parser.usage
    # Quiet: the script has said in one line what went wrong
    arguments = accelerate_parser.parse_args(["--quiet", "--module", *of_config, *of_cli, module, *own])
    if arguments.config_file is None and not os.path.isfile(default_config_file):
        # What accelerate takes where it is told nothing, and then lists in a warning
        usual = {"num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
        usual["num_processes"] = max(torch.accelerator.device_count(), 1)
        for name, value in usual.items():
            setattr(arguments, name, value if getattr(arguments, name) is None else getattr(arguments, name))
    try:
        launch_command(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def run_script(command: str, main: Callable[..., None], parser: CommandParser) -> None:
    """What a launched process does: parse, run, and end with an exit code."""
    logging.getLogger("trl_dlr").setLevel(logging.INFO)  # what there is to learn from, and in which engine
    logging.getLogger("trl_dlr").addHandler(logging.StreamHandler())
    try:
        main(*parser.parse_args_and_config(fail_with_unknown_args=False))
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report_error(command, error))
