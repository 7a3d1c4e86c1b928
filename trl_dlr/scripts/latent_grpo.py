# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Train a latent policy with reinforcement learning, for a main model that stays as it is (LatentGRPOTrainer).

Examples:

    trl-dlr train --config examples/configs/demo.yaml
    trl-dlr train --config examples/configs/gsm8k.yaml --num_processes 8 --learning_rate 3e-5
    trl-dlr train --config examples/configs/codes.yaml --policy outputs/sft_codes

With `num_eval_questions` the run ends with a table of held-out metrics: no latents, the policy before training, the
trained policy, the means of its latents, and latents shuffled between questions.
"""

from dataclasses import dataclass

from trl import ModelConfig, get_peft_config

from ..cli.launch import run_script
from ..trainer import LatentGRPOConfig, LatentGRPOTrainer
from .utils import (
    PolicyScriptArguments,
    RewardArguments,
    load_models,
    load_questions,
    save_and_push,
    train_and_evaluate,
)


@dataclass
class LatentGRPOScriptArguments(RewardArguments, PolicyScriptArguments):
    """Arguments of `trl-dlr train`."""


ARGUMENTS = (LatentGRPOScriptArguments, LatentGRPOConfig, ModelConfig)


def main(script_args: LatentGRPOScriptArguments, training_args: LatentGRPOConfig, model_args: ModelConfig) -> None:
    questions = load_questions(script_args, training_args)
    reward_funcs = script_args.load_rewards(questions.judge)
    format_weight = script_args.format_weight(training_args.reward_weights)
    trainer = LatentGRPOTrainer(
        **load_models(script_args, training_args, model_args),
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=questions.train,
        eval_dataset=questions.eval,
        peft_config=get_peft_config(model_args),
    )
    results = train_and_evaluate(trainer, script_args, questions, script_args.format_reward(), format_weight)
    save_and_push(trainer, script_args, results)


if __name__ == "__main__":
    run_script("train", main, ARGUMENTS)
