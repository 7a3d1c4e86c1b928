# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Ten steps of each method on GSM8K with SmolLM2-135M-Instruct: that they run, and what they cost.

    python examples/benchmarks/methods.py --dataset_name train.jsonl        # a JSONL file with `question` and `answer`

Every method has a process of its own, 4 rows a step (RL: 4 samples of one question), 8 latents and at most 48 tokens
of answer, in float32. Ten steps say nothing about what a method learns: a 135M model solves next to no question of
GSM8K.
"""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import common
import torch
from common import load_smollm2
from datasets import Dataset, load_dataset
from transformers import HfArgumentParser

import trl_dlr
from trl_dlr.rewards import correctness_reward
from trl_dlr.scripts.questions import with_targets


SHARED = {"max_steps": 10, "per_device_train_batch_size": 4, "num_latents": 8, "max_completion_length": 48}
SHARED |= {"learning_rate": 1e-6, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "bf16": False}
SHARED |= {"gradient_checkpointing": False, "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
GROUPS = {"num_generations": 4}
THINKING = {**GROUPS, "latent_type": "soft_tokens", "end_marker": "\n#### "}
WORKED = {name: value for name, value in SHARED.items() if name != "num_latents"}


def policy_trainer(folder: str, dataset: Dataset, **kwargs) -> Any:
    """DLR: an assistant beside the frozen main model."""
    main_model, tokenizer = load_smollm2(torch.float32)
    args = trl_dlr.LatentGRPOConfig(folder, **{**SHARED, **GROUPS, "exploration_check_prompts": 0, **kwargs})
    return trl_dlr.LatentGRPOTrainer(
        trl_dlr.first_layers(main_model, 4),
        correctness_reward,
        args,
        dataset,
        processing_class=tokenizer,
        main_model=main_model,
        main_processing_class=tokenizer,
    )


def thinking_trainer(folder: str, dataset: Dataset, name: str = "SoftTokenGRPO", **kwargs) -> Any:
    """One model that thinks and answers, trained by RL."""
    model, tokenizer = load_smollm2(torch.float32)
    args = getattr(trl_dlr, f"{name}Config")(folder, **{**SHARED, **kwargs})
    trainer = getattr(trl_dlr, f"{name}Trainer")
    return trainer(model, correctness_reward, args, dataset, processing_class=tokenizer)


def coconut_trainer(folder: str, dataset: Dataset) -> Any:
    """One model that learns to think from worked answers, in the last of four stages."""
    model, tokenizer = load_smollm2(torch.float32)
    args = trl_dlr.CoconutSFTConfig(folder, num_stages=4, latents_per_stage=2, stage_mixing=1.0, **WORKED)
    return trl_dlr.CoconutSFTTrainer(model, args, with_targets(dataset, None), processing_class=tokenizer)


METHODS: dict[str, Callable[..., Any]] = {
    "DLR, Gaussian": policy_trainer,
    "DLR, soft tokens": lambda *given: policy_trainer(
        *given, latent_density="soft_tokens", soft_token_score="lepo", latent_top_k=30
    ),
    "LEPO": lambda *given: thinking_trainer(
        *given,
        **GROUPS,
        soft_token_score="lepo",
        soft_token_temperature=0.5,
        latent_top_k=30,
        latent_top_p=0.95,
        num_iterations=2,
    ),
    "Latent-GRPO": lambda *given: thinking_trainer(
        *given,
        **THINKING,
        soft_token_score="latent_grpo",
        stop_at_end_marker=True,
        one_sided_noise=True,
        latent_top_p=0.95,
        min_candidates=10,
        mixture_size=10,
        invalid_samples="exclude",
        first_latent_selection=True,
    ),
    "hidden states, RL": lambda *given: thinking_trainer(*given, **{**THINKING, "latent_type": "hidden_states"}),
    "Coconut": coconut_trainer,
    "latent RL": lambda *given: thinking_trainer(
        *given, name="LatentRL", num_generations=4, end_marker="\n#### ", value_warmup_steps=5
    ),
}


@dataclass
class MethodsArguments:
    """Arguments of this script."""

    dataset_name: str = field(default="train.jsonl", metadata={"help": "JSONL file with `question` and `answer`."})
    output_dir: str = field(default="outputs/methods", metadata={"help": "Folder for the runs."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Which of them."})
    num_questions: int = field(default=64, metadata={"help": "Questions, the first ones of the file."})


def run(method: str, args: MethodsArguments, results: multiprocessing.Queue) -> None:
    dataset = load_dataset("json", data_files=args.dataset_name, split=f"train[:{args.num_questions}]")
    dataset = dataset.map(
        lambda row: {"prompt": [{"role": "user", "content": row["question"]}]}, remove_columns="question"
    )
    trainer = METHODS[method](f"{args.output_dir}/{method.replace(', ', '_').replace(' ', '_')}", dataset)
    clock = common.StepClock()
    trainer.add_callback(clock)
    before = common.reset_peak_memory()
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    results.put((seconds, median(clock.seconds), before, common.peak_memory(), len(losses), losses))


def main(args: MethodsArguments) -> None:
    context, rows = multiprocessing.get_context("spawn"), []
    for method in args.methods:
        results = context.Queue()
        process = context.Process(target=run, args=(method, args, results))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"{method} ended with exit code {process.exitcode}")
        seconds, step, before, peak, steps, losses = results.get()
        rows.append(
            [method, str(steps), f"{seconds:.0f}", f"{step:.2f}", f"{before / 1024:.2f}", f"{peak / 1024:.2f}"]
        )
        print(rows[-1], [round(float(loss), 4) for loss in losses], flush=True)
    common.print_table(
        "Ten steps on GSM8K, SmolLM2-135M-Instruct, float32",
        ["method", "steps", "seconds", "median s/step", "GiB before", "GiB at most"],
        rows,
    )


if __name__ == "__main__":
    main(*HfArgumentParser(MethodsArguments).parse_args_into_dataclasses())
