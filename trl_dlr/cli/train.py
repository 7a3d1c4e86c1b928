# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""`trl-dlr train`: reinforcement learning of a latent policy."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, get_peft_config

from .. import rewards
from ..report import LatentReportCallback
from ..trainer import LatentGRPOConfig, LatentGRPOTrainer, LatentSFTTrainer
from ..trainer.arguments import LatentPolicyArguments
from .arguments import RunArguments, load_split, resolve_models
from .launch import EPILOG, launch, run_script
from .parser import CommandParser, command_parser, did_you_mean


REWARDS = {name: getattr(rewards, name) for name in ("correctness_reward", "tag_format_reward")}


@dataclass
class TrainArguments(RunArguments):
    """
    Arguments of `trl-dlr train`.

    Args:
        reward_funcs (`list[str]`, *optional*, defaults to `["correctness_reward", "tag_format_reward"]`):
            Reward functions: `"correctness_reward"`, `"tag_format_reward"` (both of the package) or import paths such as
            `"my_rewards.brevity"`.
    """

    reward_funcs: list[str] = field(
        default_factory=lambda: list(REWARDS),
        metadata={"help": f"Reward functions: {', '.join(REWARDS)}, or import paths such as 'my_rewards.brevity'."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in self.reward_funcs:
            find_reward(name)


def find_reward(name: str) -> tuple[str, str]:
    """
    Module and name of a reward function. The module is looked for, in the working directory too, and not executed: so a
    wrong name is told before any process is launched.
    """
    module, _, function = name.rpartition(".")
    if name in REWARDS:
        return rewards.__name__, name
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        is_there = importlib.util.find_spec(module) is not None if module else False
    except ImportError:  # of a package that it would be in
        is_there = False
    if not is_there:
        raise ValueError(
            f"`reward_funcs` must be some of {', '.join(REWARDS)} or import paths such as 'my_rewards.brevity', but there is "
            f"no {name if not module else f'module {module}'!r}.{did_you_mean(name, REWARDS)}"
        )
    return module, function


def load_reward(name: str) -> Callable[..., list[float]]:
    """A reward function by its name, or by an import path relative to the working directory."""
    module_name, function = find_reward(name)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"`reward_funcs`: {module_name!r} cannot be imported: {error!r}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(
            f"`reward_funcs`: {module_name!r} has no function {function!r}.{did_you_mean(function, dir(module))}"
        )
    return getattr(module, function)


def main(args: TrainArguments, training_args: LatentGRPOConfig, model_args: ModelConfig) -> None:
    reward_funcs = [load_reward(name) for name in args.reward_funcs]
    train_and_save(LatentGRPOTrainer, args, training_args, model_args, reward_funcs=reward_funcs)


def train_and_save(
    trainer_class: type[LatentGRPOTrainer | LatentSFTTrainer],
    args: RunArguments,
    training_args: LatentPolicyArguments,
    model_args: ModelConfig,
    **kwargs,
) -> None:
    """What training commands have in common; `kwargs` are further arguments of the trainer."""
    model, main_model = args.policy or model_args.model_name_or_path, args.main_model_name_or_path
    has_eval = training_args.eval_strategy != "no"
    trainer = trainer_class(
        **resolve_models(model, main_model, args.assistant_num_layers, training_args, model_args),
        args=training_args,
        train_dataset=load_split(args, args.dataset_train_split),
        eval_dataset=load_split(args, args.dataset_test_split) if has_eval else None,
        peft_config=get_peft_config(model_args),
        **kwargs,
    )
    if args.report:
        trainer.add_callback(LatentReportCallback(trainer, trainer.eval_dataset or trainer.train_dataset))
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=args.dataset_name)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def make_parser(prog: str | None = None) -> CommandParser:
    return command_parser((TrainArguments, LatentGRPOConfig, ModelConfig), prog, __doc__, EPILOG)


def run(argv: list[str], prog: str) -> int:
    return launch("trl_dlr.cli.train", make_parser(prog), argv)


if __name__ == "__main__":
    run_script("train", main, make_parser("trl-dlr train"))
