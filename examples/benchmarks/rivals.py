# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Why not GRPO with LoRA? DLR beside what a user would take instead, on SmolLM2-135M-Instruct, at equal CPU time.

    python examples/benchmarks/rivals.py --probe                            # the tasks, of which the main model knows some
    python examples/benchmarks/rivals.py --pilot                            # each arm's best setting, for each task
    python examples/benchmarks/rivals.py --variants                         # what might let DLR go on where it stops
    python examples/benchmarks/rivals.py --gsm8k GSM8K --output_png a.png   # all runs that the file lacks, then tables

The pilot has a seed of its own, and holds out some of the questions to train on, so that rates and texts are not chosen by
what is reported. DLR's other settings are the demo's, whose ε was chosen on questions like those of `addition`.

GSM8K is a JSONL file with `question` and `answer`, or a Hub name. CPU seconds are the process time of training, without
loading and evaluations. Held-out questions are answered greedily, by DLR with the means of its latents, and with latents
of other questions (`shuffled`). `samples` spends the same seconds on answers of the main model alone: all of them divided
among the held-out questions, as if DLR's training served these alone. Then the most frequent answer counts
(`majority`), and `pass` is the share with any right one. Answering with DLR costs as much as about one answer.
"""

import hashlib
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import check_output, load_smollm2, peak_memory, reset_peak_memory, run_missing, spare_waste
from datasets import Dataset, load_dataset
from peft import LoraConfig, PromptTuningConfig
from tasks import TASKS, Task, same_question, stated
from transformers import HfArgumentParser, PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_dlr import LatentGRPOConfig, LatentGRPOTrainer, LatentSFTConfig, LatentSFTTrainer, first_layers
from trl_dlr.evaluation import wilson_interval
from trl_dlr.generation import TransformersEngine, tokenize_prompts
from trl_dlr.reasoners import LatentReasoner


# ---- Settings of each arm ----

COMMON = {"max_steps": 100_000, "logging_steps": 1000, "disable_tqdm": True, "lr_scheduler_type": "constant"}
COMMON |= {"save_strategy": "no", "report_to": "none", "use_cpu": not torch.cuda.is_available()}
REWARD_WEIGHTS = [1.0, 0.5]  # right, and brief
POLICY = {"latent_sampling": "parallel", "num_latents": 4, "latent_dim": 16, "freeze_embeddings": True, "bf16": False}
DLR = {**POLICY, "per_device_train_batch_size": 128, "num_generations": 16, "num_iterations": 6}
DLR |= {"learning_rate": 5e-4, "epsilon": 0.4, "exploration_check_prompts": 0}
DLR_LAYERS = 4
TEMPERATURE = 0.7  # of `samples`
SFT_DLR = {**POLICY, "per_device_train_batch_size": 12, "learning_rate": 1e-3, "projection_learning_rate": 5e-3}
SFT_DLR_SHARE = 0.2  # of the seconds, for the supervised start
GRPO = {"per_device_train_batch_size": 32, "num_generations": 8, "gradient_checkpointing": False, "bf16": False}
# The same batches in parts, which take less memory
MICRO = {**GRPO, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
SFT = {"per_device_train_batch_size": 16, "gradient_checkpointing": False, "bf16": False}
LORA = {"r": 16, "target_modules": "all-linear"}
PROMPT_TUNING = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 16, "prompt_tuning_init": "SAMPLE_VOCAB"}
# Weights below the adapters are bfloat16. All weights are trained in float32, where bfloat16 would round steps away
DTYPES = {"grpo_full": torch.float32}
# What the pilot tries: learning rates of the rivals, and texts that DLR's latents are offsets of, which the main model
# reads as the beginning of its answer. `sft_dlr` has DLR's
CHOICES = {
    "grpo_lora": [3e-4, 1e-3, 3e-3],
    "grpo_full": [3e-6, 1e-5, 3e-5],
    "sft_lora": [1e-4, 3e-4, 1e-3, 3e-3],
    "prompt_tuning": [3e-3, 1e-2, 3e-2],
    "dlr": ["Answer: ", " Answer:", " briefly", "In one sentence:"],
    "text": ["Answer: ", " Answer:", " briefly", "In one sentence:"],
}
RUNNER_UP = "grpo_lora_2"  # with the rate that was second in the pilot, which is shorter than the runs
ARMS = ["grpo_lora", RUNNER_UP, "dlr", "grpo_full", "sft_lora", "prompt_tuning", "sft_dlr", "samples", "text"]
ARMS += ["untrained"]
MICRO_ARM = "grpo_lora_micro"  # for its memory, and only if it is asked for
USED = ["addition", "chain_sum", "products", "capitals", "opposites"]
# Why DLR stops where it does: what of its settings is changed, with the pilot's seed and choice, and on which tasks
VARIANTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "as it is": ({}, ["products"]),
    # As many as the text has tokens
    "1 latent": ({"num_latents": 1}, ["opposites"]),
    "3 latents": ({"num_latents": 3}, ["products"]),
    "8 latents": ({"num_latents": 8}, ["products"]),
    "16 latents": ({"num_latents": 16}, ["products", "addition", "opposites"]),
    "32 latents": ({"num_latents": 32}, ["products"]),
    "64 dimensions": ({"latent_dim": 64}, ["products"]),
    "offsets of size 1": ({"injection_scale": 1.0}, ["products"]),
    "learned σ": ({"learn_sigma": True}, ["products"]),
    "rate 2e-3": ({"learning_rate": 2e-3}, ["products"]),
    "16 latents, rate 1e-3": ({"num_latents": 16, "learning_rate": 1e-3}, ["products"]),
    "hybrid term": ({"hybrid_coef": 0.3}, ["products"]),
}
EARLY = 50.0  # CPU seconds, of a table for those who have few
VARIANT_SECONDS = [50.0, 100.0, 150.0]
UNTOUCHED = (
    "dlr",
    "sft_dlr",
    "prompt_tuning",
    "samples",
    "text",
    "untrained",
)  # arms that leave the main model's weights


@dataclass
class RivalArguments:
    """Arguments of this script."""

    probe: bool = field(default=False, metadata={"help": "Show what the main model alone does with each task."})
    pilot: bool = field(default=False, metadata={"help": "Try each choice, on every task, with `pilot_seed`."})
    variants: bool = field(default=False, metadata={"help": "Try changes of DLR's settings, with `pilot_seed`."})
    pilot_seconds: list[float] = field(
        default_factory=lambda: [75.0, 100.0], metadata={"help": "CPU seconds of its evaluations, whose mean counts."}
    )
    pilot_seed: int = field(default=100, metadata={"help": "Its seed, which is not reported."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Arms."})
    tasks: list[str] = field(default_factory=lambda: list(USED), metadata={"help": "Tasks."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    seconds: list[float] = field(
        default_factory=lambda: [12.0, 25.0, 50.0, 75.0, 100.0, 150.0, 200.0],
        metadata={"help": "CPU seconds of training after which held-out questions are answered."},
    )
    gsm8k: str | None = field(default=None, metadata={"help": "JSONL file or Hub name of GSM8K, for forgetting."})
    runs: str = field(default="docs/benchmarks/rivals.jsonl", metadata={"help": "File with a line for each run."})
    num_workers: int = field(default=2, metadata={"help": "Runs side by side, with one thread each."})
    output_png: str | None = field(default=None, metadata={"help": "File for a plot."})

    def __post_init__(self):
        check_output(self.runs)
        check_output(self.output_png)
        for name, values, known in (("arms", self.arms, [*ARMS, MICRO_ARM]), ("tasks", self.tasks, TASKS)):
            if unknown := set(values) - set(known):
                raise ValueError(f"`{name}` must be of {', '.join(known)}, got {', '.join(sorted(unknown))}.")
        if not self.seconds or min(self.seconds) <= 0:
            raise ValueError(f"`seconds` must be positive, got {self.seconds}.")


# ---- Evaluation ----


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer, task: Task, rows: dict, temperature: float | None = None, text: str = ""
) -> list[str]:
    """Completions of the questions, greedy ones or samples, of which `text` is the beginning."""
    kwargs = {} if temperature is None else {"do_sample": True, "temperature": temperature}
    engine = TransformersEngine(model, tokenizer, task.max_new_tokens, kwargs)
    begun = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompts = [[*ids, *begun] for ids in tokenize_prompts(list(rows["prompt"]), tokenizer)]
    return engine.decode(engine.generate(prompts))


@torch.no_grad()
def adapted_answers(model: torch.nn.Module, tokenizer, task: Task, rows: dict) -> list[str]:
    """Greedy completions by PEFT's own `generate`, which adds the virtual tokens."""
    ids = tokenize_prompts(list(rows["prompt"]), tokenizer)
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
    out = model.generate(**batch, max_new_tokens=task.max_new_tokens, do_sample=False)
    start = batch["input_ids"].size(1) if out.size(1) > task.max_new_tokens else 0
    return tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)


def another_question(questions: list[str]) -> list[int]:
    """For each question another one in its place, which is not the same in another order, and gives its latents once."""
    order, size = random.Random(0).sample(range(len(questions)), len(questions)), len(questions)
    for shift in range(1, size):
        givers = {order[i]: order[(i + shift) % size] for i in range(size)}
        if all(same_question(questions[i]) != same_question(questions[j]) for i, j in givers.items()):
            return [givers[i] for i in range(size)]
    raise ValueError("The questions are all the same.")


def scores(task: Task, rows: dict, texts: list[str]) -> dict[str, Any]:
    right, brief = task.correct(texts, rows["answer"], rows["question"]), task.brief(texts)
    shares = [sum(value > 0 for value in values) / len(texts) for values in (right, brief)]
    return {"accuracy": shares[0], "brief": shares[1], "examples": texts[:3]}


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, tokenizer, gsm8k: str | None, num_rows: int = 40) -> float | None:
    """Mean log-likelihood of a token of GSM8K's text."""
    if gsm8k is None:
        return None
    is_file = Path(gsm8k).is_file()
    data = load_dataset("json", data_files=gsm8k, split="train") if is_file else load_dataset(gsm8k, "main")["test"]
    total, count = 0.0, 0
    for row in data.take(num_rows):
        ids = tokenizer(f"{row['question']}\n{row['answer']}", return_tensors="pt")["input_ids"].to(model.device)
        total -= model(input_ids=ids, labels=ids).loss.item() * (ids.size(1) - 1)
        count += ids.size(1) - 1
    return total / count


def forgetting(model: PreTrainedModel, tokenizer, task: Task, gsm8k: str | None) -> dict[str, Any]:
    others = [TASKS[name]() for name in USED if name != task.name]
    found = {}
    for other in others:
        rows = other.test[:20]
        found[other.name] = scores(other, rows, answers(model, tokenizer, other, rows))["accuracy"]
    return {"others": found, "log_likelihood": log_likelihood(model, tokenizer, gsm8k)}


def fingerprint(model: PreTrainedModel) -> str:
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def pass_at_8(reasoner: LatentReasoner, task: Task, num_questions: int = 12) -> float:
    """Share of the first held-out questions that any of 8 sampled trajectories gets right: what there is to reinforce."""
    rows = task.test[:num_questions]
    each = {name: [value for value in values for _ in range(8)] for name, values in rows.items()}
    texts = reasoner.decode(rows["prompt"], *reasoner.sample_latents(rows["prompt"], 8))
    right = [value > 0 for value in task.correct(texts, each["answer"], each["question"])]
    return statistics.fmean(any(right[start : start + 8]) for start in range(0, len(right), 8))


class EvaluateAtSeconds(TrainerCallback):
    """
    Calls `evaluate` before training and when it has taken as many CPU seconds, and stops after the last of them. The
    peak of memory is that of training alone.
    """

    def __init__(self, seconds: list[float], evaluate: Callable[[], dict[str, Any]], spent: float = 0.0):
        self.seconds, self.evaluate, self.spent = sorted(seconds), evaluate, spent
        self.rows, self.peak = [], 0.0

    def keep(self, steps: int) -> None:
        self.rows.append({"seconds": self.spent, "steps": steps, **self.evaluate()})

    def on_train_begin(self, args, state, control, **kwargs):
        self.keep(0)
        reset_peak_memory()
        self.start = time.process_time() - self.spent

    def on_step_end(self, args, state, control, **kwargs):
        self.spent = time.process_time() - self.start
        if self.spent >= self.seconds[0]:
            self.peak = max(self.peak, peak_memory())
            self.keep(state.global_step)
            self.seconds = [second for second in self.seconds if second > self.spent]
            control.should_training_stop = not self.seconds
            reset_peak_memory()
            self.start = time.process_time() - self.spent


# ---- Arms ----


def with_gold(train: Dataset) -> Dataset:
    gold = [[{"role": "assistant", "content": answer}] for answer in train["answer"]]
    return train.select_columns(["prompt"]).add_column("completion", gold)


def make_rival(arm: str, model, tokenizer, task: Task, folder: str, seed: int, rate: float) -> Trainer:
    if arm.startswith("grpo"):
        config = GRPOConfig(
            folder,
            **COMMON,
            **(MICRO if arm == MICRO_ARM else GRPO),
            seed=seed,
            learning_rate=rate,
            reward_weights=REWARD_WEIGHTS,
            max_completion_length=task.max_new_tokens,
        )
        adapter = None if arm == "grpo_full" else LoraConfig(**LORA)
        rewards = [task.correct, task.brief]
        return GRPOTrainer(
            model, rewards, config, train_dataset=task.train, processing_class=tokenizer, peft_config=adapter
        )
    config = SFTConfig(folder, **COMMON, **SFT, seed=seed, learning_rate=rate)
    adapter = LoraConfig(**LORA) if arm == "sft_lora" else PromptTuningConfig(**PROMPT_TUNING)
    return SFTTrainer(
        model, config, train_dataset=with_gold(task.train), processing_class=tokenizer, peft_config=adapter
    )


def train_rival(arm, model, tokenizer, task, folder, seed, rate, seconds) -> tuple[list[dict], float, int]:
    spare_waste(model)
    trainer = make_rival(arm, model, tokenizer, task, folder, seed, rate)
    decodes = GRPO["per_device_train_batch_size"] if arm.startswith("grpo") else 0
    rows = task.test[:]

    def evaluate() -> dict[str, Any]:
        mode, trained = trainer.model.training, trainer.model.eval()
        if arm == "prompt_tuning":
            texts = adapted_answers(trained, tokenizer, task, rows)
        else:  # LoRA's layers are inside the base model
            texts = answers(trained if arm == "grpo_full" else trained.get_base_model(), tokenizer, task, rows)
        trained.train(mode)
        return {"decodes": trainer.state.global_step * decodes, **scores(task, rows, texts)}

    return run_trainer(trainer, evaluate, seconds)


def run_trainer(trainer: Trainer, evaluate, seconds, spent: float = 0.0) -> tuple[list[dict], float, int]:
    callback = EvaluateAtSeconds(seconds, evaluate, spent)
    trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    num_trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    trainer.train()
    return callback.rows, callback.peak, num_trained


def train_latent(
    arm, model, tokenizer, task, folder, seed, anchor_text, seconds, changes
) -> tuple[list[dict], float, int]:
    common = {"processing_class": tokenizer, "main_model": model, "main_processing_class": tokenizer}
    own = {"max_completion_length": task.max_new_tokens, "seed": seed, "anchor_text": anchor_text}
    policy, curve, peak, spent = first_layers(model, DLR_LAYERS), [], 0.0, 0.0
    rows = task.test[:]
    evaluated = [0]  # answers that evaluations decoded with the trainer's engine

    def evaluation(trainer: Trainer) -> dict[str, Any]:
        before, found = trainer.engine.num_decoded, {}
        found["decodes"] = before - evaluated[0]
        with trainer.answering() as reasoner:
            latents, lengths = reasoner.sample_latents(rows["prompt"], 1, True)
            found |= scores(task, rows, reasoner.decode(rows["prompt"], latents, lengths))
            giver = another_question(rows["question"])
            shuffled = reasoner.decode(rows["prompt"], latents[giver], lengths[giver])
            found |= {f"{name}_shuffled": value for name, value in scores(task, rows, shuffled).items()}
            if trainer.state.global_step == 0:
                plain = reasoner.decode(rows["prompt"], num_anchors=latents.size(1))
                found |= {f"{name}_plain": value for name, value in scores(task, rows, plain).items()}
                found["pass@8"] = pass_at_8(reasoner, task)
        evaluated[0] += trainer.engine.num_decoded - before
        return found

    if arm == "sft_dlr":
        config = LatentSFTConfig(folder, **COMMON, **SFT_DLR, **own)
        data = task.train.add_column("completion", task.train["answer"])
        trainer = LatentSFTTrainer(policy, config, data, **common)
        start = [SFT_DLR_SHARE * max(seconds)]
        curve, peak, _ = run_trainer(
            trainer, lambda: evaluation(trainer), [*start, *(s for s in seconds if s < start[0])]
        )
        spent, policy = curve[-1]["seconds"], trainer.policy
    evaluated[0] = 0  # the next trainer has an engine of its own
    config = LatentGRPOConfig(folder, **{**COMMON, **DLR, **own, **changes}, reward_weights=REWARD_WEIGHTS)
    rl = LatentGRPOTrainer(policy, [task.correct, task.brief], config, task.train, **common)
    rest, rl_peak, num_trained = run_trainer(
        rl, lambda: evaluation(rl), [second for second in seconds if second > spent], spent
    )
    return curve + rest[bool(curve) :], max(peak, rl_peak), num_trained


def draw_samples(model, tokenizer, task, seed, seconds) -> list[dict]:
    """Answers of the main model alone to all held-out questions, again and again, for as many CPU seconds."""
    torch.manual_seed(seed)
    rows, votes, drawn, curve, spent = task.test[:], [], [], [], 0.0
    num_questions = len(rows["answer"])
    for second in sorted(seconds):
        while spent < second:
            start = time.process_time()
            texts = answers(model, tokenizer, task, rows, TEMPERATURE)
            spent += time.process_time() - start
            drawn.append([value > 0 for value in task.correct(texts, rows["answer"], rows["question"])])
            votes.append([(stated(text), right) for text, right in zip(texts, drawn[-1], strict=True)])
        of_questions = list(zip(*votes, strict=True))
        valid = [[vote for vote in of_one if vote[0] is not None] or [(None, False)] for of_one in of_questions]
        winners = [Counter(vote[0] for vote in of_one).most_common(1)[0][0] for of_one in valid]
        # The winner counts where most of those who state it do so alone
        right = [
            statistics.fmean(vote[1] for vote in of_one if vote[0] == winner) > 0.5
            for of_one, winner in zip(valid, winners, strict=True)
        ]
        curve.append({"seconds": spent, "steps": len(drawn), "decodes": len(drawn) * num_questions})
        curve[-1] |= {"accuracy": statistics.fmean(right), "single": statistics.fmean(map(statistics.fmean, drawn))}
        curve[-1]["pass"] = statistics.fmean(any(of_one) for of_one in zip(*drawn, strict=True))
    return curve


def run(
    arm: str,
    task: str,
    seed: int,
    seconds: list[float],
    choice: float | str | None,
    is_pilot: bool,
    gsm8k: str | None,
    variant: str = "as it is",
) -> dict[str, Any]:
    """One run: the curve, what it took, and what the main model is like at its end."""
    model, tokenizer = load_smollm2(DTYPES.get(arm, torch.bfloat16))
    model.eval()
    made, before, peak, num_trained = TASKS[task](), fingerprint(model), 0.0, 0
    made = made.for_pilot() if is_pilot else made
    torch.manual_seed(seed)
    rows = made.test[:]
    texts = answers(model, tokenizer, made, rows)  # also touches all weights, which are then in memory
    base = reset_peak_memory()
    with tempfile.TemporaryDirectory(prefix="rivals-") as folder:
        if arm == "untrained":
            curve = [{"seconds": 0.0, "steps": 0, "decodes": 0, **scores(made, rows, texts)}]
        elif arm == "text":
            texts = answers(model, tokenizer, made, rows, text=choice)
            curve = [{"seconds": 0.0, "steps": 0, "decodes": 0, **scores(made, rows, texts)}]
        elif arm == "samples":
            curve, peak = draw_samples(model, tokenizer, made, seed, seconds), peak_memory()
        elif arm in ("dlr", "sft_dlr"):
            changes, _ = VARIANTS[variant]
            curve, peak, num_trained = train_latent(
                arm, model, tokenizer, made, folder, seed, choice, seconds, changes
            )
        else:
            curve, peak, num_trained = train_rival(arm, model, tokenizer, made, folder, seed, choice, seconds)
    if arm in UNTOUCHED and fingerprint(model) != before:
        raise RuntimeError(f"{arm!r} has changed the main model.")
    figures = {"curve": curve, "base_memory": base, "added_memory": max(peak - base, 0.0), "trained": num_trained}
    if arm == "untrained" or not (is_pilot or arm in UNTOUCHED):
        figures |= forgetting(model.eval(), tokenizer, made, gsm8k)
    return figures


# ---- What is run, and what is shown ----


def show_probe() -> None:
    """What the main model alone does with each task, and how far a constant answer gets."""
    model, tokenizer = load_smollm2(torch.bfloat16)
    torch.manual_seed(0)
    rows = []
    for name, make in TASKS.items():
        task = make()
        data = task.test[:]
        texts = [answers(model.eval(), tokenizer, task, data, temperature) for temperature in (None, 1.0)]
        greedy, sampled = (scores(task, data, of_one)["accuracy"] for of_one in texts)
        verdict = "used" if name in USED else "left out"
        sizes = [f"{len(task.train)}", f"{len(task.test)}", f"{len(task.answers)}"]
        rows.append([name, *sizes, f"{greedy:.2f}", f"{sampled:.2f}", f"{task.best_constant():.2f}", verdict])
    columns = ["task", "train", "held out", "answers", "greedy", "sampled", "best constant", ""]
    print(markdown("The main model alone", columns, rows))


def pilot_settings(args: RivalArguments) -> list[dict[str, Any]]:
    common = {"seed": args.pilot_seed, "seconds": sorted(args.pilot_seconds), "is_pilot": True}
    same = {"sft_dlr": "dlr", RUNNER_UP: "grpo_lora", MICRO_ARM: "grpo_lora"}
    arms = dict.fromkeys(same.get(arm, arm) for arm in args.arms)
    return [
        {"arm": arm, "task": task, **common, "choice": choice}
        for task in args.tasks
        for arm in arms
        for choice in CHOICES.get(arm, ())
    ]


def variant_settings(args: RivalArguments, choices: dict[tuple[str, str], Any]) -> list[dict[str, Any]]:
    common = {"arm": "dlr", "seed": args.pilot_seed, "seconds": VARIANT_SECONDS, "is_pilot": True}
    return [
        {**common, "task": task, "choice": choices["dlr", task], "variant": variant}
        for variant, (_, tasks) in VARIANTS.items()
        for task in tasks
    ]


def variant_table(variants: list[dict[str, Any]]) -> str:
    rows = []
    for each in variants:
        curve = each["curve"]
        accuracies = (f"{row['accuracy']:.2f}" for row in curve)
        rows.append([each["task"], each["variant"], *accuracies, f"{curve[-1]['accuracy_shuffled']:.2f}"])
    columns = ["task", "changed", "before", *(f"{second:g} s" for second in VARIANT_SECONDS), "shuffled"]
    return markdown("DLR with other settings, on the pilot's questions", columns, rows)


def pilot_accuracy(pilot: dict[str, Any]) -> float:
    last = [row["accuracy"] for row in pilot["curve"] if row["seconds"] > 0]
    return statistics.fmean(last or [row["accuracy"] for row in pilot["curve"]])


def best_choices(pilots: list[dict[str, Any]]) -> dict[tuple[str, str], float | str]:
    """Of each arm and task, the choice with the highest accuracy; of equal ones, the first; and those of arms without their own."""
    tried: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for pilot in pilots:
        tried.setdefault((pilot["arm"], pilot["task"]), []).append(pilot)
    found = {}
    for (arm, task), own in tried.items():
        best, *others = sorted(own, key=pilot_accuracy, reverse=True)
        found[arm, task] = best["choice"]
        if arm == "grpo_lora":
            found[MICRO_ARM, task] = best["choice"]
        if arm == "grpo_lora" and others:
            found[RUNNER_UP, task] = others[0]["choice"]
        if arm == "dlr":
            found["sft_dlr", task] = best["choice"]
    return found


def pilot_table(args: RivalArguments, pilots: list[dict[str, Any]], choices: dict[tuple[str, str], Any]) -> str:
    """Markdown: accuracy of each choice on each task, the best ones bold."""
    rows: dict[tuple[str, float | str], list[str]] = {}
    for pilot in pilots:  # task by task
        text, is_best = f"{pilot_accuracy(pilot):.2f}", choices[pilot["arm"], pilot["task"]] == pilot["choice"]
        rows.setdefault((pilot["arm"], pilot["choice"]), []).append(f"**{text}**" if is_best else text)
    seconds = " and ".join(f"{second:g}" for second in args.pilot_seconds)
    title = f"Pilot, seed {args.pilot_seed}, mean after {seconds} CPU seconds"
    return markdown(title, ["arm", "choice", *args.tasks], [[arm, shown(c), *own] for (arm, c), own in rows.items()])


def tables(args: RivalArguments, runs: list[dict[str, Any]]) -> str:
    """Markdown: accuracies, what DLR's come from, what each arm takes, and the verdict on DLR beside GRPO with LoRA."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in runs:
        groups.setdefault((each["arm"], each["task"]), []).append(each)

    def by_task(cell: Callable[[list[dict[str, Any]], str], str]) -> list[list[str]]:
        of_arms = [[arm, *(cell(groups.get((arm, task), []), task) for task in args.tasks)] for arm in args.arms]
        return [row for row in of_arms if any(row[1:])]

    controls = [
        [task, arm, *controls_of(groups[arm, task])]
        for task in args.tasks
        for arm in ("dlr", "sft_dlr")
        if (arm, task) in groups
    ]
    costs = []
    for arm in args.arms:
        if of_arm := [each for task in args.tasks for each in groups.get((arm, task), [])]:
            costs.append([arm, *costs_of(of_arm)])
    verdicts = [
        [task, shown(groups[arm, task][0]["choice"]), *verdict(groups["dlr", task], groups[arm, task])]
        for task in args.tasks
        for arm in ("grpo_lora", RUNNER_UP)
        if ("dlr", task) in groups and (arm, task) in groups
    ]
    places = ["task", "rate", "LoRA at its end", "after", "DLR there after", "ratio"]
    places += ["LoRA at its best", "first there after", "DLR there after", "ratio", "added memory, ratio"]
    before_and_after = ["task", "arm", "text", "alone", "before", "pass@8 before", "trained", "shuffled"]
    taken = ["arm", "CPU seconds", "steps", "completions", "trained weights", "added memory, MiB", "other tasks"]
    taken += ["GSM8K, log p", "runs that fell"]
    return "\n".join(
        [
            markdown("Accuracy, mean of seeds, 95% over questions", ["arm", *args.tasks], by_task(accuracy_of)),
            markdown(f"Accuracy after {EARLY:g} seconds", ["arm", *args.tasks], by_task(early_accuracy_of)),
            markdown("Accuracy of each seed", ["arm", *args.tasks], by_task(accuracies_of)),
            markdown("Latents", before_and_after, controls),
            markdown("Means over tasks", taken, costs),
            markdown("DLR beside GRPO + LoRA (within 0.02)", places, verdicts),
        ]
    )


def ends(group: list[dict[str, Any]]) -> list[float]:
    return [each["curve"][-1]["accuracy"] for each in group]


def accuracy_of(group: list[dict[str, Any]], task: str) -> str:
    if not group:
        return ""
    accuracy = statistics.fmean(ends(group))
    low, high = wilson_interval(accuracy, len(TASKS[task]().test))  # the same questions for every seed
    return f"{accuracy:.2f} [{low:.2f}, {high:.2f}]"


def early_accuracy_of(group: list[dict[str, Any]], task: str) -> str:
    """Mean at the first evaluation past `EARLY`."""
    found = [next((row["accuracy"] for row in each["curve"] if row["seconds"] >= EARLY), None) for each in group]
    return f"{statistics.fmean(found):.2f}" if found and None not in found else ""


def accuracies_of(group: list[dict[str, Any]], task: str) -> str:
    return " / ".join(f"{value:.2f}" for value in ends(group))


def controls_of(group: list[dict[str, Any]]) -> list[str]:
    """The text that latents are offsets of, what it does alone, and what latents do before and after training."""
    first = [each["curve"][0] for each in group]
    last = [each["curve"][-1] for each in group]
    found = [[row[name] for row in first] for name in ("accuracy_plain", "accuracy", "pass@8")]
    found += [[row[name] for row in last] for name in ("accuracy", "accuracy_shuffled")]
    return [shown(group[0]["choice"]), *(f"{statistics.fmean(values):.2f}" for values in found)]


def costs_of(group: list[dict[str, Any]]) -> list[str]:
    """
    Means over runs, and how many of them ended 0.1 or more below their best evaluation. Of an arm that leaves the main
    model as it is, what it was is not asked again.
    """
    bests = [max(row["accuracy"] for row in each["curve"]) for each in group]
    fell = sum(best - end > 0.0999 for best, end in zip(bests, ends(group), strict=True))
    verdict = f"{fell} of {len(group)}"
    last = [each["curve"][-1] for each in group]
    costs = [statistics.fmean(row[name] for row in last) for name in ("seconds", "steps", "decodes")]
    costs += [statistics.fmean(each[name] for each in group) for name in ("trained", "added_memory")]
    figures = [f"{cost:,.0f}" for cost in costs]
    if "others" not in group[0]:
        return [*figures, "unchanged", "unchanged", verdict]
    others = statistics.fmean(statistics.fmean(each["others"].values()) for each in group)
    likelihoods = [each["log_likelihood"] for each in group]
    likelihood = "-" if None in likelihoods else f"{statistics.fmean(likelihoods):.3f}"
    return [*figures, f"{others:.2f}", likelihood, verdict]


def shown(choice: float | str | None) -> str:
    return "-" if choice is None else repr(choice) if isinstance(choice, str) else f"{choice:g}"


def mean_curve(group: list[dict[str, Any]], axis: str = "seconds") -> list[tuple[float, float]]:
    """Means over seeds of `axis` and accuracy, evaluation by evaluation."""
    curves = zip(*(each["curve"] for each in group), strict=False)
    return [tuple(statistics.fmean(row[key] for row in at) for key in (axis, "accuracy")) for at in curves]


def verdict(dlr: list[dict[str, Any]], rival: list[dict[str, Any]]) -> list[str]:
    """
    When DLR's mean accuracy is first within 0.02 of what the rival's is at its end, beside all of the rival's time, and
    of the rival's best, which is another place where a rival that has learned collapses, beside when the rival first
    was there; and what DLR adds to memory beside it.
    """
    row, theirs = [], mean_curve(rival)
    best = max(accuracy for _, accuracy in theirs)
    first_at_best = next(seconds for seconds, accuracy in theirs if accuracy >= best - 0.02)
    for target, first in ((theirs[-1][1], theirs[-1][0]), (best, first_at_best)):
        ours = next((seconds for seconds, accuracy in mean_curve(dlr) if accuracy >= target - 0.02), None)
        row += [f"{target:.2f}", f"{first:.0f}"]
        # What is there without training has not been learned faster
        row += ["never", "-"] if ours is None else [f"{ours:.0f}", f"{ours / first:.2f}" if first and ours else "-"]
    memory = [statistics.fmean(each["added_memory"] for each in group) for group in (dlr, rival)]
    return [*row, f"{memory[0] / memory[1]:.2f}" if memory[1] else "-"]


def markdown(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return f"\n{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot(args: RivalArguments, runs: list[dict[str, Any]]) -> None:
    """A panel per task: accuracy over CPU seconds, and below it over decodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(args.tasks), figsize=(3.4 * len(args.tasks), 6), squeeze=False, sharey="col")
    for column, task in enumerate(args.tasks):
        for number, arm in enumerate(args.arms):
            group = [each for each in runs if each["task"] == task and each["arm"] == arm]
            for row, name in enumerate(("seconds", "decodes")):
                if not group:
                    continue
                places, means = zip(*mean_curve(group, name), strict=True)
                axis = axes[row][column]
                if arm == "untrained":
                    axis.axhline(means[0], color="grey", linestyle=":", label=arm)
                elif name == "seconds" or max(places) > 0:  # supervised arms decode nothing
                    axis.plot(places, means, marker=".", color=f"C{number}", label=arm)
        axes[0][column].set(title=task, xlabel="CPU seconds", ylabel="held-out accuracy")
        axes[1][column].set(xlabel="completions", ylabel="held-out accuracy")
        axes[1][column].set_xscale("symlog", linthresh=100)
        axes[1][column].set_xlim(left=0)
    lines, names = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="lower center", ncols=len(names), fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(args.output_png, dpi=120)


def main(args: RivalArguments) -> None:
    if args.probe:
        return show_probe()
    make = partial(run, gsm8k=args.gsm8k)
    pilots = run_missing(make, pilot_settings(args), args.runs, args.num_workers)
    choices = best_choices(pilots)
    print(pilot_table(args, pilots, choices), flush=True)
    if args.pilot:
        return None
    if args.variants:
        return print(variant_table(run_missing(make, variant_settings(args, choices), args.runs, args.num_workers)))
    common = {"seconds": sorted(args.seconds), "is_pilot": False}
    settings = [
        {"arm": arm, "task": task, "seed": seed, **common, "choice": choices.get((arm, task))}
        for seed in args.seeds
        for task in args.tasks
        for arm in args.arms
    ]
    runs = run_missing(make, settings, args.runs, args.num_workers)
    print(tables(args, runs))
    if args.output_png is not None:
        plot(args, runs)
    return None


if __name__ == "__main__":
    main(*HfArgumentParser(RivalArguments).parse_args_into_dataclasses())
