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
    has_eval = training_args.eval_strategy != "no"
    train_dataset, test_dataset, judge = load_questions(script_args, has_eval or bool(script_args.num_eval_questions))
    reward_funcs = script_args.load_rewards(judge)
    trainer = trainer_class(
        **load_model(training_args, model_args),
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=test_dataset if has_eval else None,
        peft_config=get_peft_config(model_args),
    )
    questions = test_dataset if script_args.num_eval_questions else None
    results = train_and_evaluate(trainer, script_args, questions, judge, script_args.format_reward())
    save_and_push(trainer, script_args, results)


if __name__ == "__main__":
    run_script("soft-token", main, ARGUMENTS)
