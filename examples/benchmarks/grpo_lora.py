# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
The demo's rival: TRL's `GRPOTrainer` with LoRA on SmolLM2 itself, on the same questions and rewards.

    python examples/benchmarks/grpo_lora.py --seed 0

It prints held-out accuracy and format of greedy answers at given seconds of CPU time, which do not count the evaluation.
`accelerate launch examples/train_gsm8k.py` is what to read beside it.
"""

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import load_smollm2
from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_dlr.generation import TransformersEngine, tokenize_prompts
from trl_dlr.models.main_model import base_model_of
from trl_dlr.rewards import correctness_reward, get_pattern_reward
from trl_dlr.scripts.questions import addition, with_prompts


FORMAT_REWARD = get_pattern_reward(".*[0-9]")


@dataclass
class RivalArguments:
    """Arguments of the benchmark."""

    seconds: list[float] = field(
        default_factory=lambda: [60.0, 120.0, 180.0, 240.0, 300.0], metadata={"help": "CPU seconds of training."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    seed: int = field(default=0, metadata={"help": "Seed."})
    output_json: str | None = field(default=None, metadata={"help": "File for the figures."})


class EvaluateAtSeconds(TrainerCallback):
    """Evaluate when training has taken as many CPU seconds, and stop after the last of them."""

    def __init__(self, seconds: list[float], test: Dataset, processing_class: PreTrainedTokenizerBase):
        self.seconds, self.test, self.processing_class = sorted(seconds), test, processing_class
        self.rows = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.rows.append({"seconds": 0.0, "steps": 0, **self.evaluate(model)})
        self.start = time.process_time()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        taken = time.process_time() - self.start
        if taken >= self.seconds[len(self.rows) - 1]:
            self.rows.append({"seconds": taken, "steps": state.global_step, **self.evaluate(model)})
            self.start = time.process_time() - taken
            control.should_training_stop = len(self.rows) > len(self.seconds)

    @torch.no_grad()
    def evaluate(self, model) -> dict[str, float]:
        is_training = model.training
        engine = TransformersEngine(base_model_of(model).eval(), self.processing_class, 12)
        prompts = tokenize_prompts(list(self.test["prompt"]), self.processing_class)
        texts = engine.decode(engine.generate(prompts))
        model.train(is_training)
        correct = correctness_reward(completions=texts, answer=self.test["answer"])
        formatted = FORMAT_REWARD(completions=texts)
        row = {
            "accuracy": sum(r > 0 for r in correct) / len(texts),
            "format": sum(r > 0 for r in formatted) / len(texts),
        }
        print(f"{row}", flush=True)
        return row


def main(args: RivalArguments) -> None:
    model, tokenizer = load_smollm2(torch.float32)
    train, test = (with_prompts(split) for split in addition())
    callback = EvaluateAtSeconds(args.seconds, test, tokenizer)
    config = GRPOConfig(
        tempfile.mkdtemp(prefix="grpo-lora-"),
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        max_steps=100_000,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=12,
        reward_weights=[1.0, 0.5],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        seed=args.seed,
        report_to="none",
        save_strategy="no",
        logging_steps=50,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model,
        [correctness_reward, FORMAT_REWARD],
        config,
        train,
        processing_class=tokenizer,
        callbacks=[callback],
        peft_config=LoraConfig(r=args.lora_r, target_modules="all-linear"),
    )
    trainer.train()
    print(f"\n{'CPU seconds':>12}{'steps':>8}{'accuracy':>10}{'format':>8}")
    for row in callback.rows:
        print(f"{row['seconds']:>12.0f}{row['steps']:>8}{row['accuracy']:>10.2f}{row['format']:>8.2f}")
    if args.output_json is not None:
        Path(args.output_json).write_text(json.dumps({"seed": args.seed, "rows": callback.rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(HfArgumentParser(RivalArguments).parse_args_into_dataclasses()[0])
