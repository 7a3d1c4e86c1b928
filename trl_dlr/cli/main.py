# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The command `trl-dlr`."""

import argparse
import importlib
import os
import sys
import traceback

from .. import __version__
from .help import HELP_OPTIONS, help_text


# name -> (module, what it does). Those of `scripts` run under `accelerate launch`, as those of `trl` do.
COMMANDS = {
    "train": ("scripts.latent_grpo", "train a latent policy with reinforcement learning (LatentGRPOTrainer)"),
    "sft": ("scripts.latent_sft", "give a latent policy a supervised start on gold answers (LatentSFTTrainer)"),
    "soft-token": ("scripts.soft_token_grpo", "train a model that thinks in soft tokens (SoftTokenGRPOTrainer)"),
    "coconut": ("scripts.coconut_sft", "train a model to think in its hidden states (CoconutSFTTrainer)"),
    "latent-rl": ("scripts.latent_rl", "train a model of hidden thoughts by a value head (LatentRLTrainer)"),
    "eval": ("scripts.evaluate", "measure a policy on held-out questions, beside its controls"),
    "generate": ("cli.generate", "answer one or more questions with a policy"),
    "chat": ("cli.chat", "ask a policy question after question"),
    "serve": ("cli.serve", "serve policies of one main model with OpenAI's API"),
    "push": ("cli.push", "push a saved policy to the Hub"),
    "report": ("cli.report", "write the page with a run's plots"),
    "plan": ("cli.plan", "say what a run of `train` takes of each GPU's memory"),
    "env": ("cli.env", "print the versions and the machine, for an issue"),
}
DEBUG = "TRL_DLR_DEBUG"
EPILOG = """examples:
  trl-dlr plan --config run.yaml --gpu_memory 80
  trl-dlr train --config run.yaml --learning_rate 1e-4
  trl-dlr generate --policy user/policy --prompts "What is 3 + 4?" --num_samples 8 --selection majority

`trl-dlr <command> --help` lists a command's arguments. Errors are one line; `trl-dlr --debug <command>` adds where they
come from. Exit codes: 0 done, 1 an error in the run, 2 arguments that do not parse, 130 interrupted,
143 ended by SIGTERM."""


def report_error(command: str, error: BaseException) -> int:
    """Print an error in one line, or with its traceback under `--debug`; the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"trl-dlr {command}: error: {message}", file=sys.stderr)
    return 1


def run(command: str, argv: list[str]) -> int:
    """Run a command with its arguments and return its exit code."""
    module_name, _ = COMMANDS[command]
    if HELP_OPTIONS & set(argv):  # without what the command imports, which takes seconds
        print(help_text(command, module_name))
        return 0
    from .launch import launch
    from .parser import CommandParser

    module = importlib.import_module(f"..{module_name}", __package__)
    parser = CommandParser(module.ARGUMENTS, prog=f"trl-dlr {command}")
    parser.unknown_hint = getattr(module, "UNKNOWN_HINT", "")
    if module_name.startswith("scripts."):
        return launch(module.__name__, parser, argv)
    module.main(*parser.parse_args_and_config(argv))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run `trl-dlr` with `argv` (those of the process, if `None`) and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="trl-dlr",
        description="Train and use latent policies.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl_dlr {__version__}")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    argv = list(sys.argv[1:] if argv is None else argv)
    # What follows the command is the command's own to read
    index = next((i for i, argument in enumerate(argv) if argument in COMMANDS), len(argv))
    args = parser.parse_args(argv[: index + 1])
    if args.command is None:
        parser.print_help()
        return 0
    if args.debug:
        os.environ[DEBUG] = "1"  # which reaches the processes that accelerate starts
    try:
        return run(args.command, argv[index + 1 :])
    except (Exception, KeyboardInterrupt) as error:
        return report_error(args.command, error)


if __name__ == "__main__":
    sys.exit(main())
