# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Coconut's curriculum by reasoning step and by token, beside explicit steps and none, on chains of additions.

A small Llama learns from scratch to answer "7+3-5+2=" with the steps "7+3=0", "0-5=5", "5+2=7" (modulo 10) and "#7".
For each seed it is first trained on the steps written out, by TRL's SFTTrainer; then these arms go on from it, for as
many optimizer steps:

- `step`: Coconut, a stage replaces a whole step by latents
- `token`: Coconut, a stage replaces as many tokens as it adds latents, and the last one all that are left
- `cot`: SFTTrainer as before
- `none`: SFTTrainer on the answer alone, from scratch, for the steps of both parts

    python examples/benchmarks/coconut_curriculum.py
    python examples/benchmarks/coconut_curriculum.py --seeds 0 --arms step token --num_operations 2

Printed: held-out accuracy of greedy answers for each seed, and in the mean with 95% intervals over the questions
(Wilson's score). What another training would give is seen from the seeds.
"""

import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import check_output, print_accuracies
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trl_dlr import CoconutSFTConfig, CoconutSFTTrainer


Data = tuple[Dataset, Dataset]  # to train on, and held out


@dataclass
class CurriculumBenchmarkArguments:
    """Arguments of this script."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    arms: list[str] = field(default_factory=lambda: ["step", "token", "cot", "none"], metadata={"help": "Arms."})
    num_operations: int = field(default=3, metadata={"help": "Steps of a chain, and stages of the curriculum."})
    latents_per_stage: int = field(default=2, metadata={"help": "Latents that each stage adds."})
    num_train_questions: int = field(default=3200, metadata={"help": "Questions to train on."})
    num_eval_questions: int = field(default=300, metadata={"help": "Held-out questions."})
    cot_epochs: int = field(default=6, metadata={"help": "Epochs on steps written out, before the arms part."})
    epochs_per_stage: int = field(default=2, metadata={"help": "Epochs of each stage before the last."})
    last_epochs: int = field(default=3, metadata={"help": "Epochs of the last stage."})
    batch_size: int = field(default=64, metadata={"help": "Questions of an optimizer step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate, constant after 50 steps."})
    hidden_size: int = field(default=64, metadata={"help": "Of the model."})
    num_layers: int = field(default=2, metadata={"help": "Of the model."})
    output_json: str | None = field(default=None, metadata={"help": "File for the figures."})

    def __post_init__(self):
        check_output(self.output_json)

    @property
    def num_epochs(self) -> int:
        """Of an arm, after what all have in common."""
        return (self.num_operations - 1) * self.epochs_per_stage + self.last_epochs


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+-=#\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def make_model(args: CurriculumBenchmarkArguments, vocab_size: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def chains(args: CurriculumBenchmarkArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Different questions to train on and to hold out."""
    draw, rows = random.Random(seed), {}
    while len(rows) < args.num_train_questions + args.num_eval_questions:
        value = draw.randrange(10)
        prompt, steps = str(value), []
        for _ in range(args.num_operations):
            sign, operand = draw.choice("+-"), draw.randrange(10)
            result = (value + operand if sign == "+" else value - operand) % 10
            prompt, steps = f"{prompt}{sign}{operand}", [*steps, f"{value}{sign}{operand}={result}"]
            value = result
        rows[prompt] = {"prompt": f"{prompt}=", "steps": steps, "completion": f"#{value}", "answer": str(value)}
    rows = list(rows.values())
    return Dataset.from_list(rows[args.num_eval_questions :]), Dataset.from_list(rows[: args.num_eval_questions])


def is_right(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    return [1.0 if text.split("#")[-1].strip() == a else -1.0 for text, a in zip(completions, answer, strict=True)]


def settings(args: CurriculumBenchmarkArguments, folder: str, seed: int, num_epochs: int) -> dict:
    return {
        "output_dir": folder,
        "seed": seed,
        "num_train_epochs": num_epochs,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.num_eval_questions,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 50,
        "weight_decay": 0.01,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 50,
        "disable_tqdm": True,
    }


def coconut(model: LlamaForCausalLM, unit: str, args: CurriculumBenchmarkArguments, data: Data, common: dict) -> float:
    """Accuracy after Coconut's stages."""
    config = CoconutSFTConfig(
        num_stages=args.num_operations,
        latents_per_stage=args.latents_per_stage,
        curriculum_unit=unit,
        epochs_per_stage=args.epochs_per_stage,
        stage_mixing=0.0,
        max_completion_length=4,
        **common,
    )
    trainer = CoconutSFTTrainer(model, config, *data, processing_class=make_tokenizer(), reward_func=is_right)
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def plain(model: LlamaForCausalLM, with_steps: bool, data: Data, common: dict) -> float:
    """Accuracy after supervised fine-tuning on answers, with their steps or without."""

    def target(row: dict) -> dict:
        steps = "".join(f"{step}\n" for step in row["steps"]) if with_steps else ""
        return {"completion": steps + row["completion"]}

    tokenizer, (train, test) = make_tokenizer(), data
    train = train.map(target).select_columns(["prompt", "completion"])
    SFTTrainer(model, SFTConfig(**common), train_dataset=train, processing_class=tokenizer).train()
    questions = tokenizer(list(test["prompt"]), return_tensors="pt").input_ids  # all of one length
    tokens = model.eval().generate(
        questions.to(model.device), do_sample=False, max_new_tokens=8 * len(test[0]["steps"])
    )
    texts = tokenizer.batch_decode(tokens[:, questions.size(1) :], skip_special_tokens=True)
    rewards = is_right(texts, test["answer"])
    return sum(reward > 0 for reward in rewards) / len(rewards)


def run_seed(seed: int, args: CurriculumBenchmarkArguments) -> dict[str, float]:
    data, vocab_size, accuracy = chains(args, seed), len(make_tokenizer()), {}
    with tempfile.TemporaryDirectory(prefix="coconut-") as folder:
        together = args.cot_epochs + args.num_epochs
        longer, common = (settings(args, folder, seed, epochs) for epochs in (together, args.num_epochs))
        start = make_model(args, vocab_size, seed)
        accuracy["start"] = plain(start, True, data, settings(args, folder, seed, args.cot_epochs))
        for arm in args.arms:
            before, model = time.process_time(), make_model(args, vocab_size, seed)
            if arm != "none":
                model.load_state_dict(start.state_dict())
            if arm in ("step", "token"):
                accuracy[arm] = coconut(model, arm, args, data, common)
            elif arm == "cot":
                accuracy[arm] = plain(model, True, data, common)
            else:
                accuracy[arm] = plain(model, False, data, longer)
            seconds = time.process_time() - before
            print(f"seed {seed}, {arm}: {accuracy[arm]:.3f} ({seconds:.0f} s of CPU time)", flush=True)
    return accuracy


def main(args: CurriculumBenchmarkArguments) -> None:
    results = [run_seed(seed, args) for seed in args.seeds]
    steps = [epochs * -(-args.num_train_questions // args.batch_size) for epochs in (args.cot_epochs, args.num_epochs)]
    print_accuracies(results, args.num_eval_questions, f"seeds {args.seeds}, {steps[0]} + {steps[1]} steps")
    if args.output_json is not None:
        Path(args.output_json).write_text(json.dumps({"arguments": vars(args), "accuracy": results}, indent=2))


if __name__ == "__main__":
    main(*HfArgumentParser(CurriculumBenchmarkArguments).parse_args_into_dataclasses())
