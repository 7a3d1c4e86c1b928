# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Is a supervised start followed by reinforcement learning better than reinforcement learning alone, in the same time?

SmolLM2-135M-Instruct as the frozen main model, "What is a + b?", gold answers as supervised targets, 36 pairs held
out. Both arms have the same time, and for each seed they run one after the other:

    python examples/benchmarks/warm_start.py
    python examples/benchmarks/warm_start.py --seeds 0 --seconds 60 --sft_share 0.5

Time is CPU time of the process divided by its threads, which on an idle machine is wall time: what else runs on a
shared machine takes from neither arm. Printed per seed and in the mean over seeds, with 95% intervals over the
questions (Wilson's score): held-out accuracy of sampled latents without training, after the supervised part, at the
end, and with latents shuffled between questions. What another training would give is seen from the seeds.
"""

import json
import logging
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import check_output, load_smollm2, print_accuracies
from datasets import Dataset
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_dlr import LatentGRPOConfig, LatentGRPOTrainer, LatentSFTConfig, LatentSFTTrainer, first_layers
from trl_dlr.evaluation import evaluate_latents
from trl_dlr.reasoners.latent_reasoner import LatentReasoner
from trl_dlr.rewards import correctness_reward, get_pattern_reward
from trl_dlr.scripts.questions import addition, with_prompts


NUM_EVAL_QUESTIONS = 36
POLICY = {"latent_sampling": "parallel", "num_latents": 4, "latent_dim": 16, "freeze_embeddings": True}
COMMON = {
    "bf16": False,
    "lr_scheduler_type": "constant",
    "max_completion_length": 8,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 20,
    "max_steps": 100_000,  # time ends a run
    "disable_tqdm": True,
}


@dataclass
class WarmStartArguments:
    """Arguments of this script."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    seconds: float = field(default=240.0, metadata={"help": "Training time of each arm."})
    sft_share: float = field(default=0.2, metadata={"help": "Share of it that the supervised part has."})
    max_operand: int = field(default=20, metadata={"help": "Largest a and b."})
    sft_batch_size: int = field(default=12, metadata={"help": "Questions of a supervised step."})
    sft_learning_rate: float = field(default=1e-3, metadata={"help": "Of the supervised part, for the assistant."})
    sft_projection_learning_rate: float = field(default=5e-3, metadata={"help": "And for the projection layers."})
    rl_learning_rate: float = field(default=5e-4, metadata={"help": "Of reinforcement learning from the start."})
    rl_after_sft_learning_rate: float = field(default=5e-4, metadata={"help": "And after the supervised part."})
    output_json: str | None = field(default=None, metadata={"help": "File for the figures."})

    def __post_init__(self):
        check_output(self.output_json)


class TimeLimit(TrainerCallback):
    """Ends training after some seconds, CPU time divided by threads."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if (time.process_time() - self.start) / torch.get_num_threads() >= self.seconds:
            control.should_training_stop = True


def supervised(
    policy: PreTrainedModel, seconds: float, seed: int, args: WarmStartArguments, common: dict, train: Dataset
) -> LatentSFTTrainer:
    config = LatentSFTConfig(
        seed=seed,
        per_device_train_batch_size=args.sft_batch_size,
        learning_rate=args.sft_learning_rate,
        projection_learning_rate=args.sft_projection_learning_rate,
        **COMMON,
        **POLICY,
        output_dir=tempfile.mkdtemp(prefix="warm-start-"),
    )
    trainer = LatentSFTTrainer(policy, config, train, callbacks=[TimeLimit(seconds)], **common)
    trainer.train()
    return trainer


def reinforced(
    policy: PreTrainedModel, seconds: float, seed: int, learning_rate: float, common: dict, train: Dataset
) -> LatentGRPOTrainer:
    config = LatentGRPOConfig(
        seed=seed,
        per_device_train_batch_size=128,
        reward_weights=[1.0, 0.5],
        learning_rate=learning_rate,
        **COMMON,
        **POLICY,
        output_dir=tempfile.mkdtemp(prefix="warm-start-"),
    )
    rewards = [correctness_reward, get_pattern_reward(".*[0-9]")]
    trainer = LatentGRPOTrainer(policy, rewards, config, train, callbacks=[TimeLimit(seconds)], **common)
    trainer.train()
    return trainer


def accuracy(trainer: LatentSFTTrainer | LatentGRPOTrainer, test: Dataset, control: str = "policy") -> float:
    policy = trainer.accelerator.unwrap_model(trainer.model)
    reasoner = LatentReasoner(policy, trainer.processing_class, trainer.engine, trainer.main_processing_class)
    return evaluate_latents(reasoner, test, correctness_reward, control=control, batch_size=NUM_EVAL_QUESTIONS)[
        "accuracy"
    ]


def run_seed(
    seed: int, args: WarmStartArguments, main_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    splits = addition(args.max_operand, NUM_EVAL_QUESTIONS)
    train, test = (with_prompts(split, prompt_template="{question}\n") for split in splits)
    train = train.add_column("completion", train["answer"])
    common = {"main_model": main_model, "main_processing_class": tokenizer}

    def assistant() -> PreTrainedModel:
        return first_layers(main_model, 4)

    warm = supervised(assistant(), args.sft_share * args.seconds, seed, args, common, train)
    figures = {"no latents": accuracy(warm, test, "no_latents"), "after SFT": accuracy(warm, test)}
    policy = warm.policy.eval()
    rest = (1 - args.sft_share) * args.seconds
    both = reinforced(policy, rest, seed, args.rl_after_sft_learning_rate, common, train)
    figures |= {"SFT, then RL": accuracy(both, test), "SFT, then RL: shuffled": accuracy(both, test, "shuffled")}
    alone = reinforced(assistant(), args.seconds, seed, args.rl_learning_rate, common, train)
    figures |= {"RL alone": accuracy(alone, test), "RL alone: shuffled": accuracy(alone, test, "shuffled")}
    steps = {"SFT": warm, "RL after it": both, "RL alone": alone}
    print(f"seed {seed}: {figures} steps { {name: t.state.global_step for name, t in steps.items()} }", flush=True)
    return figures


def main(args: WarmStartArguments) -> None:
    logging.getLogger("trl_dlr").setLevel(logging.ERROR)
    main_model, tokenizer = load_smollm2()
    print(f"SmolLM2-135M-Instruct, {main_model.dtype}, {torch.get_num_threads()} threads", flush=True)
    results = [run_seed(seed, args, main_model, tokenizer) for seed in args.seeds]
    print_accuracies(results, NUM_EVAL_QUESTIONS, f"seeds {args.seeds}, {args.seconds:g} s an arm")
    if args.output_json is not None:
        Path(args.output_json).write_text(json.dumps(dict(zip(map(str, args.seeds), results, strict=True)), indent=2))


if __name__ == "__main__":
    main(*HfArgumentParser(WarmStartArguments).parse_args_into_dataclasses())
