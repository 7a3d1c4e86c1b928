# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""`trl-dlr sft`: a supervised start of a latent policy on gold answers."""

from trl import ModelConfig

from ..trainer import LatentSFTConfig, LatentSFTTrainer
from .arguments import RunArguments
from .launch import EPILOG, launch, run_script
from .parser import CommandParser, command_parser
from .train import train_and_save


def main(args: RunArguments, training_args: LatentSFTConfig, model_args: ModelConfig) -> None:
    train_and_save(LatentSFTTrainer, args, training_args, model_args)


def make_parser(prog: str | None = None) -> CommandParser:
    return command_parser((RunArguments, LatentSFTConfig, ModelConfig), prog, __doc__, EPILOG)


def run(argv: list[str], prog: str) -> int:
    return launch("trl_dlr.cli.sft", make_parser(prog), argv)


if __name__ == "__main__":
    run_script("sft", main, make_parser("trl-dlr sft"))
