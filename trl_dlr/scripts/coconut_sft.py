# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Train a language model to think in its own hidden states, stage by stage, on worked answers: Coconut
(CoconutSFTTrainer).

Examples:

    trl-dlr coconut --config examples/configs/coconut_gsm8k.yaml
    trl-dlr coconut --config examples/configs/coconut_gsm8k.yaml --model_name_or_path Qwen/Qwen2.5-1.5B \\
        --use_peft true --lora_r 64 --lora_target_modules all-linear
    trl-dlr coconut --config examples/configs/coconut_gsm8k.yaml \\
        --dataset_name train.jsonl --eval_dataset_name test.jsonl

A worked answer has its steps, a line each, before `#### result`, as those of GSM8K do.
"""

from trl import ModelConfig, get_peft_config

from ..cli.launch import run_script
from ..trainer import CoconutSFTConfig, CoconutSFTTrainer
from .questions import with_targets
from .utils import ScriptArguments, load_model, load_questions, save_and_push, train_and_evaluate


ARGUMENTS = (ScriptArguments, CoconutSFTConfig, ModelConfig)


def main(script_args: ScriptArguments, training_args: CoconutSFTConfig, model_args: ModelConfig) -> None:
    questions = load_questions(script_args, training_args)
    trainer = CoconutSFTTrainer(
        **load_model(training_args, model_args),
        args=training_args,
        train_dataset=with_targets(questions.train, script_args.answer_tags),
        eval_dataset=with_targets(questions.eval, script_args.answer_tags),
        reward_func=questions.judge,
        peft_config=get_peft_config(model_args),
    )
    results = train_and_evaluate(trainer, script_args, questions)
    save_and_push(trainer, script_args, results)


if __name__ == "__main__":
    run_script("coconut", main, ARGUMENTS)
