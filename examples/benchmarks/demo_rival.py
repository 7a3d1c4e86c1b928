# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
The demo beside what a user would take instead, TRL's `GRPOTrainer` with LoRA on SmolLM2 itself: the same questions, rewards
and answers of at most 12 tokens, by CPU time.

    OMP_NUM_THREADS=1 python examples/benchmarks/demo_rival.py                 # more than an hour on one core
    python examples/benchmarks/demo_rival.py --arms dlr --seeds 0 --seconds 30 60

Held-out questions are answered greedily, by DLR with the means of its latents and with those of other questions
(`shuffled`), at given CPU seconds of training. Evaluations, loading and what ends a run are not counted. On a machine
that does other work as well, decoding, which waits for memory, loses more than training does.
"""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from common import check_output, load_smollm2, print_table, write_json
from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser, PrinterCallback, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_dlr import LatentGRPOConfig, LatentGRPOTrainer, first_layers
from trl_dlr.evaluation import evaluate_latents
from trl_dlr.generation import TransformersEngine, tokenize_prompts
from trl_dlr.models.architectures import base_model_of
from trl_dlr.rewards import correctness_reward, get_pattern_reward
from trl_dlr.scripts.questions import addition, with_prompts
from trl_dlr.scripts.utils import fastest_dtype


DEMO = yaml.safe_load(Path(__file__).parents[1].joinpath("configs", "demo.yaml").read_text(encoding="utf-8"))
FORMAT_REWARD = get_pattern_reward(DEMO["answer_pattern"])
# Trained until the last evaluation
ENDLESS = {"max_steps": 100_000, "logging_steps": 1000, "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
RIVAL = {"per_device_train_batch_size": 32, "num_generations": 8, "gradient_checkpointing": False}
RIVAL |= {name: DEMO[name] for name in ("lr_scheduler_type", "max_completion_length", "reward_weights", "bf16")}
RIVAL |= {name: DEMO[name] for name in ("save_strategy", "report_to")}


@dataclass
class RivalArguments:
    """Arguments of this script."""

    arms: list[str] = field(
        default_factory=lambda: ["dlr", "lora_3e-4", "lora_1e-3"],
        metadata={"help": "`dlr`, and LoRA with these learning rates."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    seconds: list[float] = field(
        default_factory=lambda: [60.0, 120.0, 240.0, 360.0], metadata={"help": "CPU seconds of training."}
    )
    dtype: str = field(default="float32", metadata={"help": "Precision of the weights below the adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    output_json: str | None = field(default=None, metadata={"help": "File for the figures."})

    def __post_init__(self):
        check_output(self.output_json)
        for arm in self.arms:
            if re.fullmatch(r"dlr|lora_[0-9.e-]+", arm) is None:
                raise ValueError(f"`arms` must be 'dlr' or of the form 'lora_3e-4', got {arm!r}.")


class EvaluateAtSeconds(TrainerCallback):
    """Call `evaluate` before training and when it has taken as many CPU seconds, and stop after the last of them."""

    def __init__(self, seconds: list[float], evaluate: Callable[[], dict[str, float]]):
        self.seconds, self.evaluate, self.rows = sorted(seconds), evaluate, []

    def keep(self, seconds: float, steps: int) -> None:
        self.rows.append({"seconds": seconds, "steps": steps, **self.evaluate()})
        print(self.rows[-1], flush=True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.keep(0.0, 0)
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        taken = time.process_time() - self.start
        if taken >= self.seconds[len(self.rows) - 1]:
            self.keep(taken, state.global_step)
            while len(self.rows) <= len(self.seconds) and taken >= self.seconds[len(self.rows) - 1]:
                self.rows.append(self.rows[-1])  # a step that went past two of them
            self.start = time.process_time() - taken
            control.should_training_stop = len(self.rows) > len(self.seconds)


def make_dlr(folder: str, seed: int, train: Dataset, test: Dataset) -> tuple[Trainer, Callable[[], dict[str, float]]]:
    """The demo's run."""
    main_model, tokenizer = load_smollm2(fastest_dtype())
    torch.manual_seed(seed)
    settings = {name: DEMO[name] for name in LatentGRPOConfig.__dataclass_fields__ if name in DEMO}
    trainer = LatentGRPOTrainer(
        first_layers(main_model, DEMO["assistant_num_layers"]),
        [correctness_reward, FORMAT_REWARD],
        LatentGRPOConfig(
            **{**settings, **ENDLESS, "output_dir": folder, "seed": seed, "exploration_check_prompts": 0}
        ),
        train,
        processing_class=tokenizer,
        main_model=main_model,
        main_processing_class=tokenizer,
    )

    def evaluate() -> dict[str, float]:
        num_rollouts = -(-trainer.state.global_step // DEMO["num_iterations"])
        figures = {"completions": num_rollouts * DEMO["per_device_train_batch_size"]}
        with trainer.answering() as reasoner:
            for control in ("mean_latents", "shuffled"):
                found = evaluate_latents(reasoner, test, correctness_reward, FORMAT_REWARD, control=control, seed=seed)
                suffix = "" if control == "mean_latents" else "_shuffled"
                figures |= {f"{name}{suffix}": found[name] for name in ("accuracy", "format")}
        return figures

    return trainer, evaluate


def make_rival(
    folder: str, seed: int, train: Dataset, test: Dataset, learning_rate: float, args: RivalArguments
) -> tuple[Trainer, Callable[[], dict[str, float]]]:
    """GRPO on the tokens of SmolLM2, with adapters."""
    model, tokenizer = load_smollm2(getattr(torch, args.dtype))
    trainer = GRPOTrainer(
        model,
        [correctness_reward, FORMAT_REWARD],
        GRPOConfig(folder, **RIVAL, **ENDLESS, learning_rate=learning_rate, seed=seed),
        train,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=args.lora_r, target_modules="all-linear"),
    )

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        was_training = trainer.model.training
        engine = TransformersEngine(base_model_of(trainer.model).eval(), tokenizer, DEMO["max_completion_length"])
        texts = engine.decode(engine.generate(tokenize_prompts(list(test["prompt"]), tokenizer)))
        trainer.model.train(was_training)
        rewards = {
            "accuracy": correctness_reward(completions=texts, answer=test["answer"]),
            "format": FORMAT_REWARD(completions=texts),
        }
        shares = {name: sum(value > 0 for value in values) / len(texts) for name, values in rewards.items()}
        return {"completions": trainer.state.global_step * RIVAL["per_device_train_batch_size"], **shares}

    return trainer, evaluate


def run(arm: str, seed: int, args: RivalArguments) -> list[dict[str, Any]]:
    """Figures at each time, of one arm and one seed."""
    train, test = (with_prompts(split) for split in addition())
    with tempfile.TemporaryDirectory(prefix="demo-rival-") as folder:
        if arm == "dlr":
            trainer, evaluate = make_dlr(folder, seed, train, test)
        else:
            trainer, evaluate = make_rival(folder, seed, train, test, float(arm.removeprefix("lora_")), args)
        callback = EvaluateAtSeconds(args.seconds, evaluate)
        trainer.add_callback(callback)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return callback.rows


def main(args: RivalArguments) -> None:
    # Arms of a seed follow each other, so that what slows the machine down slows all of them
    by_seed = [{arm: run(arm, seed, args) for arm in args.arms} for seed in args.seeds]
    results = {arm: [of_arms[arm] for of_arms in by_seed] for arm in args.arms}
    rows = []
    for arm, of_seeds in results.items():
        for at in range(len(args.seconds) + 1):
            cells = [[seed[at].get(name, float("nan")) for seed in of_seeds] for name in ("accuracy", "format")]
            shuffled = [[seed[at]["accuracy_shuffled"] for seed in of_seeds]] if arm == "dlr" else []
            texts = [" / ".join(f"{value:.2f}" for value in values) for values in cells + shuffled]
            names = ("seconds", "steps", "completions")
            sizes = [" / ".join(f"{seed[at][name]:.0f}" for seed in of_seeds) for name in names]
            rows.append([arm, *sizes, *texts, *([] if shuffled else ["-"])])
    columns = ["arm", "CPU seconds", "steps", "completions", "accuracy", "format", "accuracy, shuffled"]
    print_table(f"Held-out questions of the demo, seeds {args.seeds}", columns, rows)
    write_json(args, "demo_rival", "SmolLM2-135M-Instruct", results)


if __name__ == "__main__":
    main(*HfArgumentParser(RivalArguments).parse_args_into_dataclasses())
