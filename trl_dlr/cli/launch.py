# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Training scripts, launched through accelerate."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException

from .help import HELP_OPTIONS, help_text
from .main import COMMANDS, report_error
from .parser import CommandParser


def launch(module: str, parser: CommandParser, argv: list[str]) -> int:
    """
    Run the script that a module is under `accelerate launch`.

    Args:
        module (`str`):
            Name of the module.
        parser ([`CommandParser`]):
            Its arguments, which are checked here first: a wrong one is told once, not by every process. What it does
            not know goes to `accelerate launch`.
        argv (`list[str]`):
            Arguments.

    Returns:
        `int`: exit code of the script, or as a shell has it of a signal, 128 and its number.
    """
    accelerate_parser = launch_command_parser()
    parser.others = (accelerate_parser,)
    *_, of_config, of_cli = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    script_arguments, unknown = [], list(of_cli)
    for argument in argv:  # `of_cli` holds, in order, those that are not the script's
        if unknown and argument == unknown[0]:
            unknown.pop(0)
        else:
            script_arguments.append(argument)
    accelerate_parser.prog, accelerate_parser.usage = parser.prog, parser.usage
    arguments = accelerate_parser.parse_args(["--module", *of_config, *of_cli, module, *script_arguments])
    if arguments.config_file is None and not os.path.isfile(default_config_file):
        # What accelerate takes where it is told nothing, and then lists in a warning
        usual = {"num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
        usual["num_processes"] = max(torch.accelerator.device_count(), 1)
        for name, value in usual.items():
            setattr(arguments, name, value if getattr(arguments, name) is None else getattr(arguments, name))
    environment = dict(os.environ)
    if is_on_cpus(arguments):
        # accelerate would start one process: this is its name for torchrun, whose processes would not find each other
        arguments.multi_gpu, os.environ["ACCELERATE_USE_CPU"] = True, "true"
    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:  # the script has said in one line what went wrong
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except SignalException as error:  # torchrun has passed it on by itself
        return 128 + error.sigval
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
    return 0


def is_on_cpus(arguments: argparse.Namespace) -> bool:
    """Whether several processes are to share the CPUs, and nothing but their number says so."""
    is_told = arguments.config_file is not None or os.path.isfile(default_config_file) or arguments.use_deepspeed
    return arguments.num_processes not in (None, 1) and not is_told and not torch.accelerator.is_available()


def pass_on(number: int, frame: Any) -> None:
    """What the launcher does with a signal: a scheduler sends it here alone, and the script has to save."""
    if not psutil.Process().children():  # none has been started yet
        raise SystemExit(128 + number)
    if number == signal.SIGINT:  # a terminal has sent it to the script as well, which may end by it
        time.sleep(1)
    for process in psutil.Process().children():
        process.send_signal(number)


def run_script(command: str, main: Callable[..., None], dataclass_types: tuple[type, ...]) -> None:
    """
    What a launched process does: parse, run, and end with an exit code.

    Args:
        command (`str`):
            Command that launches the script.
        main (`Callable`):
            What to run with the parsed arguments.
        dataclass_types (`tuple[type, ...]`):
            Arguments.
    """
    if HELP_OPTIONS & set(sys.argv):
        print(help_text(command, COMMANDS[command][0]))
        return
    parser = CommandParser(dataclass_types, prog=f"trl-dlr {command}")
    # A YAML file may hold accelerate's arguments, too. On the command line of a script that runs they come too late
    parser.others, parser.takes_others = (launch_command_parser(),), False
    parser.unknown_hint = " Arguments of accelerate go before the script, or to `trl-dlr`."
    try:
        main(*parser.parse_args_and_config())
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report_error(command, error))
