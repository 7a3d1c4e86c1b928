# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Train a language model that thinks in its own hidden states: Coconut, stage by stage, on GSM8K's worked steps.

GSM8K from the Hub with the published constants, or from local JSONL files with `question` and `answer` (steps, a line
each, then `#### result`):

    accelerate launch examples/coconut_gsm8k.py --config examples/configs/coconut_gsm8k.yaml
    accelerate launch examples/coconut_gsm8k.py --config examples/configs/coconut_gsm8k.yaml \
        --dataset_name train.jsonl --eval_dataset_name test.jsonl

With LoRA on a larger model:

    accelerate launch examples/coconut_gsm8k.py --config examples/configs/coconut_gsm8k.yaml \
        --model_name_or_path Qwen/Qwen2.5-1.5B --use_peft true --lora_r 64 --lora_target_modules all-linear

Every field of `CoconutSFTConfig`, TRL's `ModelConfig` and the data arguments of `ScriptArguments` of `train_gsm8k.py`
can be given on the command line. The run ends with held-out loss and accuracy before and after.
"""

import logging

from sft_gsm8k import with_targets
from train_gsm8k import ScriptArguments, load_questions, save_and_end
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_dlr import CoconutSFTConfig, CoconutSFTTrainer
from trl_dlr.cli.parser import CommandParser


def main(script_args: ScriptArguments, training_args: CoconutSFTConfig, model_args: ModelConfig) -> None:
    logging.getLogger("trl_dlr").setLevel(logging.INFO)
    logging.getLogger("trl_dlr").addHandler(logging.StreamHandler())
    given = {name: getattr(model_args, name) for name in ("dtype", "attn_implementation")}
    given = {"revision": model_args.model_revision, **{name: value for name, value in given.items() if value}}
    training_args.model_init_kwargs = {**given, **(training_args.model_init_kwargs or {})}
    train_dataset, test_dataset = load_questions(script_args)
    trainer = CoconutSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=with_targets(train_dataset, script_args.answer_tags),
        eval_dataset=with_targets(test_dataset, script_args.answer_tags),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    results = {"before": trainer.evaluate()}
    is_last = str(training_args.resume_from_checkpoint).lower() == "true"
    trainer.train(resume_from_checkpoint=is_last or training_args.resume_from_checkpoint)
    results["after"] = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        for name, figures in results.items():
            print(f"{name:<8}" + "".join(f"{key} {figures[f'eval_{key}']:.3f}  " for key in ("loss", "accuracy")))
    save_and_end(trainer, results, script_args, report=False)


if __name__ == "__main__":
    main(*CommandParser((ScriptArguments, CoconutSFTConfig, ModelConfig)).parse_args_and_config())
