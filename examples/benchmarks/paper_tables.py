# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
The claims of the paper DeepLatent Reasoning (arXiv 2601.17275), tested one by one in the small world of tests/tiny.py.

    python examples/benchmarks/paper_tables.py --runs tables.jsonl            # within an hour on two cores
    python examples/benchmarks/paper_tables.py --runs quick.jsonl --quick     # minutes: fewer seeds, smaller budgets
    python examples/benchmarks/paper_tables.py --runs tables.jsonl --tables table3 stability

A question is `[letter][a][b]`, and the letter decides the operation. Pairs of operands are held out. Three main models:

- `told`: it calculates after `[op][op]`, and does not know whose operation is which, nor how to write one.
- `thinks`: it writes an operation at random before its result, `[op][op]=x`: whoever trains its tokens can learn to
  write the right one.
- `steps`: the same with two results in a row, `[op][op]=x=y`; a checker reads all of it, the reward only y.

All arms of a table have the same questions, and are judged alike. A rival of DLR trains all weights of the main model,
with the settings, of a grid, that a pilot on a seed of its own found best. Seconds are CPU seconds of training alone.
A run goes on until it has spent both budgets: as many decodes as all have, and the CPU seconds that DLR with
pre-screening took for them. Each run is one line in `--runs`, and what is there is not run again. Printed: markdown
tables, mean and 95% interval by Student's t over seeds.
"""

import copy
import functools
import io
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from common import check_output, peak_memory, reset_peak_memory, run_missing, write_json
from datasets import Dataset
from small_world import questions
from transformers import HfArgumentParser, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from tests.learners import ON_A_CPU, make_learner
from tests.tiny import OPERATIONS, answer_of, result, tiny_tokenizer, trained_main_model
from trl_dlr import LatentGRPOTrainer
from trl_dlr.evaluation import answer_questions, majority_at_k, mean_interval, pass_at_k
from trl_dlr.generation import TransformersEngine, tokenize_prompts


# ---- Arms ----

CONSTANT = {"per_device_train_batch_size": 256, "num_generations": 16, "lr_scheduler_type": "constant"}
DLR = {**CONSTANT, "latent_sampling": "parallel", "num_iterations": 4, "learning_rate": 1e-3}
PRESCREENED = {"prescreening_fraction": 0.18, "prescreening_warmup_rollouts": 10}
CONTRAST = {"gamma": 0.1}
HYBRID = {"hybrid_coef": 0.1}
MAIN_MODEL_RATE = 1e-4  # where DLR trains it too

RIVALS = {"GRPO": {}, "GSPO": {"importance_sampling_level": "sequence", "loss_type": "grpo"}, "GMPO": {}}
RATES, PASSES, BETA = (1e-4, 3e-4, 1e-3, 3e-3), (1, 4), 0.04
PILOT_SEED = 100

# What the main model was trained to write, its results, and tokens of a completion at most
WORLDS = {
    "told": ({"steps": 600}, 1, 3),
    "thinks": ({"steps": 1200, "batch_size": 64, "hint": 0.0}, 1, 6),
    "steps": ({"steps": 2000, "batch_size": 64, "hint": 0.0, "num_results": 2}, 2, 8),
    # So briefly that each of its tokens is uncertain; told the operation in half of the batches
    "chain": ({"steps": 150, "batch_size": 64, "num_hints": (0, 2), "num_results": 16}, 16, 32),
}
NUM_TOKENS, NUM_LATENTS = (2, 4, 8, 16, 32), (1, 2, 4, 8)
SAMPLES = 64
NUM_POINTS = 12  # of a curve, for either budget

TABLES = ("table3", "stability", "variance", "table4", "contrastive", "test_time", "steps")
SIZES = {  # at full size and quick
    "seeds": (5, 2),
    "decodes": (24_000, 6_000),
    "short_decodes": (12_000, 4_000),  # of tables that compare DLR with itself
    "pilot_decodes": (24_000, 4_000),
    "estimates": (64, 16),
}


# ---- The world ----


def world_of(name: str) -> tuple[LlamaForCausalLM, list[dict], list[dict], int]:
    """A main model of its own, questions to train on, held-out ones, and tokens of a completion."""
    settings, num_results, num_tokens = WORLDS[name]
    train, held_out = questions(1, 2, 3, 4), questions(0)
    for row in train + held_out:
        a, b = int(row["prompt"][1]), int(row["prompt"][2])
        row["answer"] = answer_of(row["op"], a, b, num_results)
    return copy.deepcopy(trained_main_model(**settings)), train, held_out, num_tokens


def judged(completion: str, op: str, answer: str) -> tuple[bool, bool]:
    """Whether the final result is right, and whether all that was written on the way to it is."""
    text = re.fullmatch(r"([-+*^]*)((?:=\d)+)", completion.replace(" ", ""))
    if text is None:
        return False, False
    return text[2][-2:] == answer[-2:], set(text[1]) <= {op} and text[2][:-2] == answer[:-2]


class FinalAnswer:
    """Reward of a final result, 1 or -1, and what it has seen."""

    __name__ = "final_answer"

    def __init__(self):
        self.num_decoded, self.rewards = 0, []

    def __call__(self, completions, op, answer, **kwargs) -> list[float]:
        rewards = [1.0 if judged(*row)[0] else -1.0 for row in zip(completions, op, answer, strict=True)]
        self.num_decoded += len(rewards)
        self.rewards.append((len(rewards), statistics.fmean(rewards)))
        return rewards


def right_digits(completions, answer, **kwargs) -> list[float]:
    """Share of right tokens at their places: its scale does not depend on how many there are."""
    texts = [completion.replace(" ", "") for completion in completions]
    return [
        sum(x == y for x, y in zip(text[1::2], right[1::2], strict=False)) / len(text[1::2] or "-")
        for text, right in zip(texts, answer, strict=True)
    ]


def skill_of(main_model: LlamaForCausalLM) -> float:
    """Share of right results where the operation is given: what the main model was trained for."""
    rows = [(op, a, b) for op in OPERATIONS for a in range(10) for b in range(10)]
    prompts = [f"{'ABCDEFGH'[i % 8]}{a}{b}{op}{op}" for i, (op, a, b) in enumerate(rows)]
    texts = write(main_model, prompts, 2)
    return statistics.fmean(text.replace(" ", "") == f"={result(*row)}" for text, row in zip(texts, rows, strict=True))


@torch.no_grad()
def write(model: LlamaForCausalLM, prompts: Sequence[str], num_tokens: int, sampled: bool = False) -> list[str]:
    was_training = model.training
    engine = TransformersEngine(model.eval(), tiny_tokenizer(), num_tokens, {"do_sample": True} if sampled else None)
    texts = engine.decode(engine.generate(tokenize_prompts(list(prompts), tiny_tokenizer())))
    model.train(was_training)
    return texts


# ---- Trainers ----


class TrainableMainLatentGRPOTrainer(LatentGRPOTrainer):
    """The arm of the paper's Table 4 whose main model is trained too, by the gradient of the hybrid term."""

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        weights = list(self.main_model.requires_grad_(True).parameters())
        optimizer.add_param_group({"params": weights, "lr": MAIN_MODEL_RATE, "weight_decay": 0.0})
        optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(weights, 1.0) and None)
        # Trainer clears the gradients of the policy alone
        optimizer.register_step_post_hook(lambda *_: self.main_model.zero_grad())
        return optimizer


def make_trainer(arm: str, config: dict, main_model, rows: list[dict], reward, folder: str, seed: int) -> Trainer:
    shared = {"max_steps": 1_000_000, "logging_steps": 5, "seed": seed}
    if arm.startswith("DLR"):
        shared |= {"exploration_check_prompts": 0, "main_model": main_model, "reward": reward, **config}
        trainer_class = TrainableMainLatentGRPOTrainer if "trainable" in arm else LatentGRPOTrainer
        trainer = make_learner(folder, seed, dataset=Dataset.from_list(rows), trainer_class=trainer_class, **shared)
    else:
        # TRL loads the reference model of its KL from where the model was
        main_model.save_pretrained(f"{folder}/main")
        model = LlamaForCausalLM.from_pretrained(f"{folder}/main")
        trainer_class, config_class = (GMPOTrainer, GMPOConfig) if arm == "GMPO" else (GRPOTrainer, GRPOConfig)
        args = config_class(folder, **{**ON_A_CPU, **CONSTANT, "gradient_checkpointing": False, **shared, **config})
        data = {"train_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer()}
        trainer = trainer_class(model, reward, args, **data)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Watch(TrainerCallback):
    """Held-out accuracy along the way, against decodes and CPU seconds, until both budgets are spent."""

    def __init__(self, reward: FinalAnswer, tokens: list[int], evaluate: Callable[[], float], decodes, seconds):
        self.reward, self.tokens, self.evaluate, self.budgets = reward, tokens, evaluate, (decodes, seconds)
        self.curve, self.grad_norms, self.diversity, self.peak = [], [], [], 0.0
        self.taken, self.reached = 0.0, None

    def keep(self) -> None:
        self.peak = max(self.peak, peak_memory())
        tokens = self.tokens[0]
        point = {"seconds": self.taken, "decodes": self.reward.num_decoded, "tokens": tokens}
        self.curve.append({**point, "accuracy": self.evaluate()})
        self.tokens[0] = tokens  # those of evaluations do not count
        reset_peak_memory()
        self.start = time.process_time() - self.taken

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = reset_peak_memory()
        self.keep()

    def on_step_end(self, args, state, control, **kwargs):
        self.taken = time.process_time() - self.start
        spent = zip((self.reward.num_decoded, self.taken), self.budgets, strict=True)
        reached = [
            NUM_POINTS if not budget else min(NUM_POINTS, int(NUM_POINTS * used / budget)) for used, budget in spent
        ]
        if reached != self.reached:
            self.reached = reached
            self.keep()
        control.should_training_stop = min(reached) == NUM_POINTS

    def on_log(self, args, state, control, logs, **kwargs):
        if "grad_norm" in logs and self.reward.num_decoded <= self.budgets[0]:
            self.grad_norms.append(float(logs["grad_norm"]))
        if "latent/diversity" in logs:
            self.diversity.append(logs["latent/diversity"])


# ---- Runs: figures of one arm and one seed ----


def run(kind: str, **settings) -> dict[str, Any]:
    return {"learn": learn, "variance": estimate_gradient}[kind](**settings)


def learn(world: str, arm: str, config: dict, seed: int, decodes: int, seconds: float, samples: int) -> dict[str, Any]:
    """Train until both budgets are spent, and answer the held-out questions along the way."""
    main_model, train, held_out, num_tokens = world_of(world)
    is_dlr, reward, tokens = arm.startswith("DLR"), FinalAnswer(), [0]
    figures = {"skill before": skill_of(main_model), "parameters": 0, "tokens": 0, "peak memory": 0.0}
    weights = copy.deepcopy(main_model.state_dict())
    test, prompts = Dataset.from_list(held_out), [row["prompt"] for row in held_out]

    def answers(control: str = "mean_latents", num_samples: int = 1) -> list[list[str]]:
        if is_dlr:
            with trainer.answering() as reasoner, redirect_stderr(io.StringIO()):  # which shows its progress
                return answer_questions(reasoner, test, control, num_samples, batch_size=len(test), seed=seed)
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        texts = write(main_model, repeated, num_tokens, sampled=control == "policy")
        return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]

    def verdicts(texts: list[list[str]]) -> list[list[tuple[bool, bool]]]:
        return [
            [judged(text, row["op"], row["answer"]) for text in own] for own, row in zip(texts, held_out, strict=True)
        ]

    def share(texts: list[list[str]]) -> float:
        return statistics.fmean(is_right for own in verdicts(texts) for is_right, _ in own)

    with tempfile.TemporaryDirectory() as folder:
        if arm == "untrained":
            curve = [{"seconds": 0.0, "decodes": 0, "tokens": 0, "accuracy": share(answers())}]
        else:
            config = {**config, "max_completion_length": num_tokens}
            trainer = make_trainer(arm, config, main_model, train, reward, folder, seed)
            if not is_dlr:
                main_model = trainer.model

            def count(module, args, kwargs):
                read = kwargs.get("inputs_embeds")
                tokens[0] += math.prod((kwargs["input_ids"] if read is None else read).shape[:2])

            main_model.register_forward_pre_hook(count, with_kwargs=True)
            watch = Watch(reward, tokens, lambda: share(answers()), decodes, seconds)
            trainer.add_callback(watch)
            trainer.train()
            curve = watch.curve
            trained = [trainer.model, *([main_model] if "trainable" in arm else [])]
            trained += [trainer.prescreener.head] if is_dlr and trainer.prescreener is not None else []
            figures["parameters"] = sum(p.numel() for m in trained for p in m.parameters() if p.requires_grad)
            figures["peak memory"] = watch.peak - watch.before
            figures |= stability(curve, reward.rewards, watch.grad_norms, decodes)
            if watch.diversity:
                figures["diversity"] = statistics.fmean(watch.diversity[-10:])
        if is_dlr and "trainable" not in arm:
            same = all(torch.equal(value, weights[name]) for name, value in main_model.state_dict().items())
            assert same, "the frozen main model changed"
        figures |= {
            "accuracy": at(curve, "decodes", decodes)["accuracy"],
            "tokens": at(curve, "decodes", decodes)["tokens"],
        }
        figures["seconds"] = at(curve, "decodes", decodes)["seconds"]
        figures["at equal seconds"] = at(curve, "seconds", seconds or figures["seconds"])["accuracy"]
        figures["skill after"] = skill_of(main_model)
        if is_dlr:
            figures["shuffled"] = share(answers("shuffled"))
        last = [pair for own in verdicts(answers()) for pair in own]
        figures["right"] = statistics.fmean(is_right for is_right, _ in last)
        figures["invalid steps"] = statistics.fmean(not is_valid for _, is_valid in last)
        valid = [is_valid for is_right, is_valid in last if is_right]
        figures["invalid where right"] = 1 - statistics.fmean(valid) if valid else math.nan
        if samples:
            figures |= at_k(answers("policy", samples), verdicts)
    return {**figures, "curve": curve}


def at(curve: list[dict], name: str, budget: float) -> dict[str, float]:
    """The first point at which as much was spent, or the last."""
    return next((point for point in curve if point[name] >= budget), curve[-1])


def stability(curve: list[dict], rewards: list[tuple[int, float]], grad_norms: list[float], decodes: int) -> dict:
    """Of training up to the budget of decodes. Rewards are means of at least 256 decodes: fewer would be noisier."""
    means, seen, count, total = [], 0, 0, 0.0
    for size, mean in rewards:
        seen, count, total = seen + size, count + size, total + size * mean
        if count >= 256 and seen <= decodes + 256:
            means.append(total / count)
            count, total = 0, 0.0
    last = means[-max(2, len(means) // 5) :]
    reached = [point["accuracy"] for point in curve if point["decodes"] <= decodes + 256]
    return {
        "reward std": statistics.pstdev(last),
        "gradient norm cv": statistics.pstdev(grad_norms) / max(statistics.fmean(grad_norms), 1e-12),
        "collapsed": float(reached[-1] < max(reached) / 2),
    }


def at_k(texts: list[list[str]], verdicts: Callable) -> dict[str, float]:
    """pass@k and majority@k of the samples; what is no answer is a vote of its own."""
    right = [[is_right for is_right, _ in own] for own in verdicts(texts)]
    votes = [[(re.findall(r"=\s*(\d)$", text) or ["none"])[0] for text in own] for own in texts]
    figures = {}
    for k in (2**i for i in range(len(texts[0]).bit_length())):
        figures[f"pass@{k}"] = statistics.fmean(pass_at_k(len(own), sum(own), k) for own in right)
        pairs = zip(votes, right, strict=True)
        figures[f"majority@{k}"] = statistics.fmean(majority_at_k(own, is_right, k) for own, is_right in pairs)
    return figures


def estimate_gradient(arm: str, num_tokens: int, num_latents: int, seed: int, estimates: int) -> dict[str, float]:
    """
    Normalized variance E|g - mean|^2 / |mean|^2 of the gradient of one rollout, 16 answers to each of the same 16
    questions, at unchanged weights. Answers have as many tokens as `num_tokens` says, and the reward is the share of
    right digits, normalized in each group. |mean|^2 is estimated without bias.
    """
    main_model, train, *_ = world_of("chain")
    rows = train[:: len(train) // 16][:16]
    config = {"learning_rate": 0.0, "max_grad_norm": 0.0, "num_iterations": 1, "max_steps": estimates}
    config |= {"max_completion_length": num_tokens, "generation_kwargs": {"min_new_tokens": num_tokens}}
    if arm == "DLR":
        config = {**DLR, **config, "num_latents": num_latents}
    gradients = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            gradients.append(torch.cat(parts).double())

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(arm, config, main_model, rows, right_digits, folder, seed)
        trainer.add_callback(Keep())
        trainer.train()
    mean = torch.stack(gradients).mean(0)
    variance = sum((g - mean).square().sum().item() for g in gradients) / (len(gradients) - 1)
    signal = mean.square().sum().item() - variance / len(gradients)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {
        "variance": variance / signal if signal > 0 else math.inf,
        "reward": statistics.fmean(rewards),
    }


# ---- Plans: which runs a table needs ----


def pilot_settings(world: str, decodes: int, quick: bool) -> dict[str, list[dict]]:
    """Runs of the grid, by rival. The KL is tried with the rates in the middle, which are all of them if quick."""
    rates = RATES[1:3] if quick else RATES
    grid = [{"learning_rate": rate, "num_iterations": passes} for rate in rates for passes in PASSES]
    grid += [{**each, "beta": BETA} for each in grid if each["learning_rate"] in RATES[1:3] and not quick]
    shared = {"kind": "learn", "world": world, "seed": PILOT_SEED, "decodes": decodes, "seconds": 0.0, "samples": 0}
    return {arm: [{**shared, "arm": arm, "config": {**own, **each}} for each in grid] for arm, own in RIVALS.items()}


def main_settings(args, make: Callable, world: str, seconds: float, best: dict[str, dict]) -> list[dict]:
    arms = {"untrained": {}, **best, "DLR": DLR, "DLR, K/G = 0.18": {**DLR, **PRESCREENED}}
    arms |= {"DLR, contrastive": {**DLR, **CONTRAST}}
    return [
        make(world, arm, config, args.size("decodes"), 0.0 if arm == "DLR, K/G = 0.18" else seconds, SAMPLES)
        for arm, config in arms.items()
    ]


@dataclass
class PaperTablesArguments:
    """Arguments of this script."""

    runs: str = field(metadata={"help": "File with a line of JSON for each run; what it has is not run again."})
    tables: list[str] = field(default_factory=lambda: list(TABLES), metadata={"help": "Which.", "choices": TABLES})
    quick: bool = field(default=False, metadata={"help": "Fewer seeds and smaller budgets."})
    workers: int = field(default=2, metadata={"help": "Processes side by side, of one thread each."})
    output_json: str | None = field(default=None, metadata={"help": "File for the summary."})
    output_png: str | None = field(default=None, metadata={"help": "File for the figure, one panel a claim."})

    def __post_init__(self):
        check_output(self.output_json)
        check_output(self.output_png)

    def size(self, name: str) -> int:
        return SIZES[name][self.quick]


# ---- Tables ----


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and what the interval reaches to either side."""
    values = [value for value in values if math.isfinite(value)]
    if len(values) < 2:
        return f"{values[0]:,.{digits}f}" if values else "-"
    mean, low, _ = mean_interval(values)
    return f"{mean:,.{digits}f}" + ("" if low == mean else f" ± {mean - low:,.{digits}f}")


def by_arm(results: list[dict], arm_of: Callable[[dict], str] = lambda line: line["arm"]) -> dict[str, list[dict]]:
    arms = {}
    for line in results:
        arms.setdefault(arm_of(line), []).append(line)
    return arms


def print_markdown(title: str, arms: dict[str, list[dict]], columns: dict[str, int]) -> None:
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    for arm, lines in arms.items():
        cells = ([line[name] for line in lines if name in line] for name in columns)
        rows.append([arm, *(interval(own, digits) for own, digits in zip(cells, columns.values(), strict=True))])
    print(f"\n### {title}\n", *(f"| {' | '.join(row)} |" for row in rows), sep="\n", flush=True)


def slopes(lines: list[dict], name: str) -> list[float]:
    """Of log variance against the log of `name`, for each seed."""
    found = []
    for own in by_arm(lines, lambda line: line["seed"]).values():
        points = [
            (math.log(line[name]), math.log(line["variance"])) for line in own if math.isfinite(line["variance"])
        ]
        if len(points) > 1:
            found.append(statistics.linear_regression(*zip(*points, strict=True)).slope)
    return found


def main(args: PaperTablesArguments) -> None:
    wanted, start, summary = set(args.tables), time.perf_counter(), {}
    seeds = range(args.size("seeds"))

    def make(world, arm, config, decodes, seconds=0.0, samples=0):
        shared = {"kind": "learn", "world": world, "arm": arm, "config": config}
        return {**shared, "decodes": decodes, "seconds": seconds, "samples": samples}

    def of_seeds(settings: list[dict]) -> list[dict]:
        return [{**each, "seed": seed} for seed in seeds for each in settings]

    def make_runs(name: str, settings: list[dict]) -> list[dict]:
        print(f"{name}: {len(settings)} runs, {time.perf_counter() - start:.0f} s so far", flush=True)
        return run_missing(run, settings, args.runs, args.workers)

    def keep(table: str, title: str, arms: dict[str, list[dict]], columns: dict[str, int]) -> None:
        if table in wanted:
            print_markdown(f"{table}: {title}", arms, columns)
            figures = {arm: {n: [line.get(n) for line in own] for n in columns} for arm, own in arms.items()}
            summary.setdefault(table, {})[title] = figures

    best = {}
    needs_rivals = wanted & {"table3", "stability", "test_time"}
    for world in ["told"] * bool(needs_rivals) + ["thinks"] * bool(needs_rivals | wanted & {"steps"}):
        pilots = pilot_settings(world, args.size("pilot_decodes"), args.quick)
        found = by_arm(make_runs(f"pilot, {world}", [each for grid in pilots.values() for each in grid]))
        best[world] = {arm: max(own, key=lambda line: line["accuracy"])["config"] for arm, own in found.items()}
        summary.setdefault("pilot", {})[world] = {
            arm: [{"config": line["config"], "accuracy": line["accuracy"]} for line in own]
            for arm, own in found.items()
        }
        for arm, own in found.items():
            print(f"{world}, {arm}: {best[world][arm]}", *(f"{line['accuracy']:.2f}" for line in own))

    curves = {}
    for world in ("told", "thinks") if needs_rivals else ():
        make_own = functools.partial(main_settings, args, make, world, best=best[world])
        first = of_seeds([each for each in make_own(0.0) if each["arm"] == "DLR, K/G = 0.18"])
        seconds = round(statistics.fmean(line["seconds"] for line in make_runs(f"{world}, clock", first)), 1)
        arms = curves[world] = by_arm(make_runs(world, of_seeds(make_own(seconds))))
        columns = {"accuracy": 3, "at equal seconds": 3, "shuffled": 3, "skill before": 3, "skill after": 3}
        columns |= {"seconds": 1, "tokens": 0, "parameters": 0, "peak memory": 1}
        budget = f"{world}, {args.size('decodes'):,} decodes or {seconds} CPU seconds"
        keep("table3", budget, arms, columns)
        trained = {arm: own for arm, own in arms.items() if arm != "untrained"}
        keep("stability", world, trained, {"reward std": 3, "gradient norm cv": 2, "collapsed": 2})
        ks = {f"{what}@{2**i}": 3 for what in ("pass", "majority") for i in range(SAMPLES.bit_length())}
        keep("test_time", world, arms, ks)

    variance = []
    if "variance" in wanted:
        shared = {"kind": "variance", "estimates": args.size("estimates")}
        lengths = [
            {**shared, "arm": a, "num_tokens": n, "num_latents": 2} for a in ("GRPO", "DLR") for n in NUM_TOKENS
        ]
        latents = [{**shared, "arm": "DLR", "num_tokens": 8, "num_latents": n} for n in NUM_LATENTS if n != 2]
        variance = make_runs("variance", of_seeds(lengths + latents))
        dlr = [line for line in variance if line["arm"] == "DLR"]
        measured = {
            "tokens, GRPO": ("num_tokens", [line for line in variance if line["arm"] == "GRPO"]),
            "tokens, DLR of 2 latents": ("num_tokens", [line for line in dlr if line["num_latents"] == 2]),
            "latents, DLR of 8 tokens": ("num_latents", [line for line in dlr if line["num_tokens"] == 8]),
        }
        for title, (name, lines) in measured.items():
            arms = by_arm(sorted(lines, key=lambda line: line[name]), lambda line, name=name: str(line[name]))
            keep("variance", title, arms, {"variance": 2, "reward": 3})
            summary["variance"][f"slope, {title}"] = slopes(lines, name)
            print(f"\nSlope of log variance: {interval(slopes(lines, name), 2)}")

    short = args.size("short_decodes")
    if "table4" in wanted:
        arms = {"DLR, frozen": DLR, "DLR, frozen, hybrid": {**DLR, **HYBRID}, "DLR, trainable": {**DLR, **HYBRID}}
        found = by_arm(make_runs("table4", of_seeds([make("told", arm, c, short) for arm, c in arms.items()])))
        columns = {"accuracy": 3, "shuffled": 3, "skill before": 3, "skill after": 3, "reward std": 3}
        keep("table4", "main model frozen or trainable", found, {**columns, "gradient norm cv": 2, "seconds": 1})

    if "contrastive" in wanted:
        losses = {"none": {}} | {
            s: {**CONTRAST, "contrastive_similarity": s} for s in ("dot", "cosine", "infonce", "margin")
        }
        ways = [(sampling, learned) for sampling in ("parallel", "autoregressive") for learned in (False, True)]
        arms = {
            f"DLR, {sampling}, σ {'learned' if learned else 'fixed'}, {loss}": {
                **DLR, **terms, "latent_sampling": sampling, "learn_sigma": learned
            }
            for sampling, learned in ways
            for loss, terms in losses.items()
            if not args.quick or (sampling == "parallel" and loss in ("none", "dot", "cosine"))
        }  # fmt: skip
        found = by_arm(
            make_runs("contrastive", of_seeds([make("told", a, c, short, 0.0, 8) for a, c in arms.items()]))
        )
        keep(
            "contrastive", "accuracy and diversity", found, {"accuracy": 3, "shuffled": 3, "diversity": 3, "pass@8": 3}
        )

    if "steps" in wanted:
        arms = {"untrained": {}, "GRPO": best["thinks"]["GRPO"], "DLR": DLR}
        settings = [make("steps", arm, config, args.size("decodes")) for arm, config in arms.items()]
        found = by_arm(make_runs("steps", of_seeds(settings)))
        columns = {"right": 3, "invalid steps": 3, "invalid where right": 3, "shuffled": 3, "skill after": 3}
        keep("steps", "right results, and steps on the way", found, columns)

    print(f"\n{time.perf_counter() - start:.0f} s", flush=True)
    write_json(args, "paper_tables", "tests/tiny.py", summary)
    if args.output_png is not None:
        plot(args.output_png, summary, curves, variance)


def plot(path: str, summary: dict, curves: dict, variance: list[dict]) -> None:
    """One panel a claim."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(f"accuracy by {name}, {world}", world, name) for world in curves for name in ("decodes", "seconds")]
    bars = {
        "stability": "reward std", "table4": "accuracy", "contrastive": "diversity", "steps": "invalid steps"
    }  # fmt: skip
    bars = {table: name for table, name in bars.items() if table in summary}
    others = ["variance"] * bool(variance) + ["test_time"] * ("test_time" in summary) + list(bars)
    num_panels = len(panels) + len(others)
    figure, axes = plt.subplots(-(-num_panels // 3), 3, figsize=(15, 4 * -(-num_panels // 3)), squeeze=False)
    axes = list(axes.flat)
    for axis, (title, world, name) in zip(axes, panels, strict=False):
        for arm, lines in curves[world].items():
            points = list(zip(*(line["curve"] for line in lines), strict=False))
            xs = [statistics.fmean(point[name] for point in at_once) for at_once in points]
            axis.plot(
                xs, [statistics.fmean(p["accuracy"] for p in at_once) for at_once in points], "o-", ms=2, label=arm
            )
        axis.set(title=title, ylim=(0, 1))
        axis.legend(fontsize=6)
    for axis, table in zip(axes[len(panels) :], others, strict=False):
        axis.set_title(table)
        if table == "variance":
            for arm in ("GRPO", "DLR"):
                of_tokens = by_arm(
                    [v for v in variance if v["arm"] == arm and v["num_latents"] == 2], lambda v: v["num_tokens"]
                )
                axis.loglog(
                    list(of_tokens), [statistics.fmean(v["variance"] for v in own) for own in of_tokens.values()], "o-"
                )
            axis.legend(["GRPO", "DLR"])
            axis.set_xlabel("tokens")
        elif table == "test_time":
            for arm, figures in next(iter(summary[table].values())).items():
                ks = [name for name in figures if name.startswith("pass")]
                axis.semilogx(
                    [int(n.split("@")[1]) for n in ks], [statistics.fmean(figures[n]) for n in ks], label=arm
                )
            axis.legend(fontsize=6)
        else:
            arms = next(iter(summary[table].values()))
            axis.barh(list(arms), [statistics.fmean(figures[bars[table]]) for figures in arms.values()])
            axis.set_xlabel(bars[table])
            axis.tick_params(axis="y", labelsize=6)
    for axis in axes[num_panels:]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(PaperTablesArguments).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory(prefix="paper-tables-") as main_models:
        os.environ.setdefault("TRAINED_MODELS", main_models)
        os.environ["TQDM_DISABLE"] = "1"
        main(arguments)
