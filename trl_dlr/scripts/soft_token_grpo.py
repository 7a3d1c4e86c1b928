# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Train a language model that thinks in soft tokens before it answers: LEPO and the paper "Latent-GRPO"
(SoftTokenGRPOTrainer).

Examples:

    trl-dlr soft-token --config examples/configs/lepo.yaml
    trl-dlr soft-token --config examples/configs/latent_grpo.yaml --num_processes 8

Ten steps on a CPU, from a local JSONL file with `question` and `answer`, with SmolLM2:

    trl-dlr soft-token --config examples/configs/lepo.yaml --dataset_name train.jsonl --num_eval_questions 16 \\
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --max_steps 10 --per_device_train_batch_size 4 \\
        --num_generations 4 --gradient_accumulation_steps 1 --num_latents 8 --max_completion_length 48 --bf16 false
"""

from dataclasses import dataclass

from trl import ModelConfig, get_peft_config

from ..cli.launch import run_script
from ..trainer import SoftTokenGRPOConfig, SoftTokenGRPOTrainer
from .utils import (
    RewardArguments,
    ScriptArguments,
    load_model,
    load_questions,
    save_and_push,
    train_and_evaluate,
)


@dataclass
class ThinkingScriptArguments(RewardArguments, ScriptArguments):
    """Arguments of `trl-dlr soft-token` and `trl-dlr latent-rl`."""


ARGUMENTS = (ThinkingScriptArguments, SoftTokenGRPOConfig, ModelConfig)


def main(
    script_args: ThinkingScriptArguments,
    training_args: SoftTokenGRPOConfig,
    model_args: ModelConfig,
    trainer_class: type[SoftTokenGRPOTrainer] = SoftTokenGRPOTrainer,
) -> None:
    questions = load_questions(script_args, training_args)
    reward_funcs = script_args.load_rewards(questions.judge)
    format_weight = script_args.format_weight(training_args.reward_weights)
    trainer = trainer_class(
        **load_model(training_args, model_args),
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=questions.train,
        eval_dataset=questions.eval,
        peft_config=get_peft_config(model_args),
    )
    results = train_and_evaluate(trainer, script_args, questions, script_args.format_reward(), format_weight)
    save_and_push(trainer, script_args, results)


if __name__ == "__main__":
    run_script("soft-token", main, ARGUMENTS)
