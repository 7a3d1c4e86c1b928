# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""`trl-dlr sft`: a supervised start of a latent policy on gold answers."""

from trl import ModelConfig, TrlParser, get_peft_config

from ..trainer import LatentSFTConfig, LatentSFTTrainer
from .arguments import RunArguments, load_split, resolve_models
from .launch import EPILOG, launch, run_script
from .train import train_and_save


def main(args: RunArguments, training_args: LatentSFTConfig, model_args: ModelConfig) -> None:
    has_eval = training_args.eval_strategy != "no"
    trainer = LatentSFTTrainer(
        **resolve_models(
            args.policy or model_args.model_name_or_path,
            args.main_model_name_or_path,
            args.assistant_num_layers,
            training_args,
            model_args,
        ),
        args=training_args,
        train_dataset=load_split(args, args.dataset_train_split),
        eval_dataset=load_split(args, args.dataset_test_split) if has_eval else None,
        peft_config=get_peft_config(model_args),
    )
    train_and_save(trainer, args)


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser(
        (RunArguments, LatentSFTConfig, ModelConfig), prog=prog, description=__doc__.replace("`", ""), epilog=EPILOG
    )


def run(argv: list[str], prog: str) -> int:
    return launch("trl_dlr.cli.sft", make_parser(prog), argv)


if __name__ == "__main__":
    run_script("sft", main, make_parser("trl-dlr sft"))
