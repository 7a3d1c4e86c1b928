# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Give a latent policy a supervised start on gold answers, worked ones stage by stage (LatentSFTTrainer).

Examples:

    trl-dlr sft --config examples/configs/sft_codes.yaml
    trl-dlr sft --config examples/configs/sft_gsm8k_smollm2.yaml \\
        --dataset_name train.jsonl --eval_dataset_name test.jsonl

Reinforcement learning goes on from its result, with the same prompts: `trl-dlr train --policy <output_dir>`. With
`num_eval_questions` the run ends with what that would start from: the controls, the share of questions whose samples
differ in reward, the size of the means, and which part of the policy gets a gradient.
"""

from trl import ModelConfig, get_peft_config

from ..cli.launch import run_script
from ..evaluation import preflight
from ..trainer import LatentSFTConfig, LatentSFTTrainer
from .questions import with_targets
from .utils import PolicyScriptArguments, load_models, load_questions, save_and_push, train_and_evaluate


ARGUMENTS = (PolicyScriptArguments, LatentSFTConfig, ModelConfig)


def main(script_args: PolicyScriptArguments, training_args: LatentSFTConfig, model_args: ModelConfig) -> None:
    questions = load_questions(script_args, training_args)
    trainer = LatentSFTTrainer(
        **load_models(script_args, training_args, model_args),
        args=training_args,
        train_dataset=with_targets(questions.train, script_args.answer_tags),
        eval_dataset=with_targets(questions.eval, script_args.answer_tags),
        reward_func=questions.judge,
        peft_config=get_peft_config(model_args),
    )
    results = train_and_evaluate(trainer, script_args, questions)
    if questions.held_out is not None:
        with trainer.answering() as reasoner:
            results["preflight"] = preflight(
                reasoner,
                questions.held_out,
                questions.judge,
                num_samples=script_args.num_eval_samples,
                batch_size=script_args.eval_batch_questions,
                seed=training_args.seed,
                found=results,
            )
        if trainer.accelerator.is_main_process:
            print("What reinforcement learning would start from:")
            for name, value in results["preflight"].items():
                print(f"  {name:<28}{value:.3f}", flush=True)
    save_and_push(trainer, script_args, results)


if __name__ == "__main__":
    run_script("sft", main, ARGUMENTS)
