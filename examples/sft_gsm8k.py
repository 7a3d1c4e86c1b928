# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Give a latent policy a supervised start on gold answers, worked ones stage by stage, for `train_gsm8k.py` to go on from.

GSM8K from the Hub, or from local JSONL files with `question` and `answer` (steps, a line each, then `#### result`):

    accelerate launch examples/sft_gsm8k.py --config examples/configs/sft_gsm8k.yaml
    accelerate launch examples/sft_gsm8k.py --config examples/configs/sft_gsm8k_smollm2.yaml \
        --dataset_name train.jsonl --eval_dataset_name test.jsonl

Then reinforcement learning from its result, with the same prompts:

    accelerate launch examples/train_gsm8k.py --config examples/configs/gsm8k_smollm2.yaml \
        --dataset_name train.jsonl --eval_dataset_name test.jsonl --answer_tags answer \
        --policy outputs/sft_gsm8k_smollm2 \
        --system_prompt "Give the final number between <answer> and </answer>." --anchor_text "Answer: "

Offline, answers without steps: a code that only the policy learns (`codes.yaml` goes on with reinforcement learning):

    python examples/sft_gsm8k.py --config examples/configs/sft_codes.yaml

Every field of `LatentSFTConfig`, TRL's `ModelConfig` and `ScriptArguments` of `train_gsm8k.py` can be given on the
command line. The held-out accuracy is that of answers decoded from sampled latents. The run ends with what reinforcement
learning would start from: the main model alone, with plain anchor tokens, with latents and with shuffled ones, the share
of questions whose samples differ in reward, the size of the means, and which part of the policy gets a gradient.
"""

import logging
import re
from typing import Any

from datasets import Dataset
from train_gsm8k import ScriptArguments, build_models, load_questions, save_and_end
from trl import ModelConfig, get_peft_config

from trl_dlr import LatentReportCallback, LatentSFTConfig, LatentSFTTrainer
from trl_dlr.cli.parser import CommandParser
from trl_dlr.evaluation import preflight
from trl_dlr.reasoners.latent_reasoner import LatentReasoner
from trl_dlr.rewards import correctness_reward


def worked(row: dict[str, Any], answer_tags: list[str] | None) -> dict[str, Any]:
    """Steps without GSM8K's calculator marks, and the result as the format reward asks for it."""
    steps, _, result = row["answer"].rpartition("####")
    lines = [re.sub(r"<<.*?>>", "", line).strip() for line in steps.splitlines() if line.strip()]
    tag = answer_tags[-1] if answer_tags else None
    return {"steps": lines, "completion": f"<{tag}>{result.strip()}</{tag}>" if tag else result.strip()}


def with_targets(dataset: Dataset, answer_tags: list[str] | None) -> Dataset:
    """Questions with the completion to learn and the steps before it; all of them, if no answer has steps."""
    dataset = dataset.map(worked, fn_kwargs={"answer_tags": answer_tags})
    with_steps = dataset.filter(lambda row: len(row["steps"]) > 0)
    return with_steps if len(with_steps) > 0 else dataset.remove_columns("steps")


def main(script_args: ScriptArguments, training_args: LatentSFTConfig, model_args: ModelConfig) -> None:
    logging.getLogger("trl_dlr").setLevel(logging.INFO)  # says in which engine the policy is trained
    logging.getLogger("trl_dlr").addHandler(logging.StreamHandler())
    models = build_models(script_args, training_args, model_args)
    train_dataset, test_dataset = load_questions(script_args)
    trainer = LatentSFTTrainer(
        **models,
        args=training_args,
        train_dataset=with_targets(train_dataset, script_args.answer_tags),
        eval_dataset=with_targets(test_dataset, script_args.answer_tags),
        peft_config=get_peft_config(model_args),
    )
    if script_args.report:
        trainer.add_callback(LatentReportCallback(trainer, test_dataset))
    results = {"before": trainer.evaluate()}
    is_last = str(training_args.resume_from_checkpoint).lower() == "true"
    trainer.train(resume_from_checkpoint=is_last or training_args.resume_from_checkpoint)
    results["after"] = trainer.evaluate()
    reasoner = LatentReasoner(trainer.policy, trainer.processing_class, trainer.engine, trainer.main_processing_class)
    start_of_rl = preflight(reasoner, test_dataset, correctness_reward, num_samples=script_args.num_eval_samples)
    if trainer.accelerator.is_main_process:
        for name, figures in results.items():
            print(f"{name:<8}" + "".join(f"{key} {figures[f'eval_{key}']:.3f}  " for key in ("loss", "accuracy")))
        print("What reinforcement learning would start from:")
        for name, value in start_of_rl.items():
            print(f"  {name:<28}{value:.3f}")
    results["preflight"] = start_of_rl
    save_and_end(trainer, results, script_args)


if __name__ == "__main__":
    main(*CommandParser((ScriptArguments, LatentSFTConfig, ModelConfig)).parse_args_and_config())
