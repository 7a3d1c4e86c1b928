# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
What is learned in a small world where latents are needed: the experiments whose tables the docs have.

The world is tests/tiny.py: a question is `[letter][a][b]`, the letter decides the operation, and a main model of two
layers can calculate once it is told with which. Pairs of operands are held out. tests/learners.py has the trainers,
and the settings that all arms share. Minutes of one core each, no download:

    python examples/benchmarks/small_world.py --experiment methods         # docs/soft_token_grpo.md
    python examples/benchmarks/small_world.py --experiment prescreening    # docs/benchmarks.md
    python examples/benchmarks/small_world.py --experiment few_right       # docs/benchmarks.md
    python examples/benchmarks/small_world.py --experiment stop_cost       # docs/concepts.md
    python examples/benchmarks/small_world.py --experiment warm_start      # docs/latent_sft.md
    python examples/benchmarks/small_world.py --experiment latent_rl       # docs/latent_rl.md
    python examples/benchmarks/small_world.py --experiment methods --arms LEPO --seeds 0 1

Printed: a markdown table of held-out figures, one for each seed. Processors, and numbers of threads, round
differently.
"""

import copy
import functools
import math
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from common import check_output, write_json
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import HfArgumentParser, LlamaForCausalLM

from tests.learners import LARGE, ON_A_CPU, accuracy, make_learner, make_thinker, make_warm_start
from tests.tiny import OPERATION_OF, fit, ids_of, random_main_model, result, tiny_reward, tiny_tokenizer
from trl_dlr.experimental.latent_rl import LatentRLConfig, LatentRLTrainer
from trl_dlr.models.hidden_thoughts import read_with_thoughts


# ---- Arms ----

LEARNER = {"main_model_steps": 600, "logging_steps": 100}
CONSTANT = {"per_device_train_batch_size": 256, "lr_scheduler_type": "constant"}

THINKER = {"main_model_steps": 1200, "max_steps": 100}
EXACT = {**THINKER, "soft_token_score": "exact", "soft_token_temperature": 0.5, "num_latents": 2}
LATENT_GRPO = {**THINKER, "soft_token_score": "latent_grpo", "num_latents": 4, "latent_top_p": 0.95}
LATENT_GRPO |= {"end_marker": "=", "stop_at_end_marker": True}
LATENT_GRPO |= {"min_candidates": 4, "mixture_size": 4}  # as many as there are operations
LATENT_GRPO |= {"one_sided_noise": True, "invalid_samples": "exclude", "first_latent_selection": True}
BOTH_SIGNS = {**LATENT_GRPO, "one_sided_noise": False}
METHODS = {
    "DLR, Gaussian": {**LEARNER, **CONSTANT, "max_steps": 300},
    "exact Gumbel-softmax": EXACT,
    "LEPO": {**EXACT, "soft_token_score": "lepo", "latent_top_k": 10, "latent_top_p": 0.95},
    "Latent-GRPO, all three remedies": LATENT_GRPO,
    "noise of both signs": BOTH_SIGNS,
    "noise of both signs, invalid samples kept": {**BOTH_SIGNS, "invalid_samples": "keep"},
    "noise of both signs, invalid samples included": {**BOTH_SIGNS, "invalid_samples": "include"},
    "noise of both signs, all first latents": {**BOTH_SIGNS, "first_latent_selection": False},
}

# 375 rollouts of 8 questions, the first 120 of which are decoded whole
WHOLE = {**LEARNER, "latent_sampling": "parallel", "exploration_check_prompts": 0, "max_steps": 1500}
SIX = {**WHOLE, "num_generations": 32, "prescreening_fraction": 0.18, "prescreening_warmup_rollouts": 120}
PRESCREENING = {
    "all of 32": {**WHOLE, "num_generations": 32},
    "6 of 32, `top_bottom`": {**SIX, "prescreening_selection": "top_bottom"},
    "6 of 32, `random`": {**SIX, "prescreening_selection": "random"},
    "6 of 32, `top_random`": {**SIX, "prescreening_selection": "top_random"},
    "groups of 6": {**WHOLE, "num_generations": 6},
}

# 500 rollouts of 8 questions, the first 20 of which are decoded whole
THREE = {**WHOLE, "max_steps": 2000, "lr_scheduler_type": "constant", "num_generations": 16}
THREE |= {"prescreening_fraction": 0.18, "prescreening_warmup_rollouts": 20}
FEW_RIGHT = {
    f"3 of 16, `{name}`": {**THREE, "prescreening_selection": name} for name in ("top_random", "top_bottom", "random")
}

# The main model calculates after one, two or three hints, so that one latent is enough
STOP = {**LEARNER, **CONSTANT, "num_hints": (1, 2, 3), "num_latents": 3, "learn_stop": True, "max_steps": 600}
STOP_COST = {"no cost": STOP, "c = 0.1": {**STOP, "latent_cost": 0.1}}

START = {**LEARNER, "sft_steps": 400, "rl_steps": 60, "rl_alone_steps": 600}
WARM_START = {"d = 64": {**START, "latent_dim": 64}, "d = 512": {**START, "latent_dim": 512}}

HACKING = {**ON_A_CPU, "main_model_steps": 600, "num_latents": 2, "value_warmup_steps": 100, "max_steps": 300}
HACKING |= {"learning_rate": 1e-4, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 320}
HACKING |= {"generation_kwargs": {"do_sample": False}, "eval_strategy": "steps", "eval_steps": 100}
LATENT_RL = {
    "after the value phase": {**HACKING, "max_steps": 100},
    "no stop": {**HACKING, "hacking_window": 0},
    "stopped": HACKING,
    "learning rate / 10": {**HACKING, "learning_rate": 1e-5},
}


# ---- Experiments: figures of one arm and one seed ----


def compare_methods(folder: str, seed: int, **settings) -> dict[str, Any]:
    trainer = (make_thinker if "soft_token_score" in settings else make_learner)(folder, seed, **settings)
    before, start = accuracy(trainer), time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    after = {"after": accuracy(trainer), "latents shuffled": accuracy(trainer, "shuffled")}
    return {"before": before, **after, "steps": trainer.state.global_step, "seconds": seconds}


def prescreen(folder: str, seed: int, num_generations: int, **settings) -> dict[str, Any]:
    sizes = {"num_generations": num_generations, "per_device_train_batch_size": 8 * num_generations}
    trainer = make_learner(folder, seed, seed=seed, **sizes, **settings)
    trainer.train()
    num_decoded, reached = trainer.engine.num_decoded, accuracy(trainer)
    return {"decoded": num_decoded, "mean accuracy": reached, "seeds": reached}


def learn_to_stop(folder: str, seed: int, **settings) -> dict[str, Any]:
    trainer = make_learner(folder, seed, **settings)
    untrained = accuracy(trainer)
    trainer.train()
    lengths = [entry["latent/mean_length"] for entry in trainer.state.log_history if "latent/mean_length" in entry]
    return {"untrained": untrained, "accuracy": accuracy(trainer), "mean length at the end": lengths[-1]}


def start_warm(
    folder: str, seed: int, latent_dim: int, sft_steps: int, rl_steps: int, rl_alone_steps: int, **settings
):
    warm = make_warm_start(f"{folder}/sft", seed, latent_dim=latent_dim, max_steps=sft_steps, **settings)
    figures = {"untrained": warm.evaluate()["eval_accuracy"]}
    warm.train()
    warm.save_model()
    figures[f"{sft_steps} supervised steps"] = warm.evaluate()["eval_accuracy"]
    settings |= {**LARGE, **CONSTANT, "seed": seed}
    both = make_learner(f"{folder}/rl", seed, model=f"{folder}/sft", max_steps=rl_steps, **settings)
    both.train()
    figures |= {f"then {rl_steps} steps of RL": accuracy(both), "shuffled": accuracy(both, "shuffled")}
    alone = make_learner(f"{folder}/alone", seed, latent_dim=latent_dim, max_steps=rl_alone_steps, **settings)
    alone.train()
    return {**figures, f"{rl_alone_steps} steps of RL alone": accuracy(alone)}


def questions(*shares: int) -> list[dict[str, str]]:
    """All questions whose pairs are in some of five equal shares."""
    pairs = [(a, b) for a in range(10) for b in range(10) if (a + 3 * b) % 5 in shares]
    kinds = OPERATION_OF.items()
    return [{"prompt": f"{i}{a}{b}", "op": op, "answer": str(result(op, a, b))} for i, op in kinds for a, b in pairs]


@functools.lru_cache
def thinking_in_hidden_states(seed: int, steps: int) -> LlamaForCausalLM:
    """
    A model trained as Coconut's are: `[letter][a][b]`, then `[op][op]`, one after the other replaced by latents, then
    `=result`, on three fifths of the pairs.
    """
    model, generator = random_main_model(seed).train(), torch.Generator().manual_seed(seed)
    rows = ids_of(["{prompt}{op}{op}={answer}".format(**row) for row in questions(2, 3, 4)])

    def loss_of_step(step: int) -> torch.Tensor:
        num_latents = [0, 0, 1, 2, 2][step * 5 // steps]
        ids = rows[torch.randint(len(rows), (128,), generator=generator)]
        is_latent = torch.zeros_like(ids).bool()
        is_latent[:, 3 : 3 + num_latents] = True
        states = read_with_thoughts(model.base_model, ids, torch.ones_like(ids), is_latent).last_hidden_state
        logits = model.lm_head(states[:, 2 + num_latents : -1])
        return cross_entropy(logits.flatten(0, 1), ids[:, 3 + num_latents :].flatten())

    fit(model, steps, loss_of_step)
    return model.eval()


def hack_rewards(folder: str, seed: int, main_model_steps: int, **settings) -> dict[str, Any]:
    model = copy.deepcopy(thinking_in_hidden_states(seed, main_model_steps))
    # To train on and to evaluate on; half of each are known from the supervised training
    data = [Dataset.from_list(questions(*shares)) for shares in ((1, 2), (0, 3))]
    args = LatentRLConfig(folder, seed=seed, **settings)
    trainer = LatentRLTrainer(model, tiny_reward, args, *data, tiny_tokenizer())
    trainer.train()
    trainer.evaluate()
    titles = {"accuracy": "accuracy", "predicted_accuracy": "predicted accuracy", "score": "score"}
    titles |= {"auc": "AUC of the head", "f1": "F1 of the head"}
    last = trainer.state.log_history[-1]  # has no AUC where all answers are right, or all wrong
    figures = {title: last.get(f"eval_value/{name}", math.nan) for name, title in titles.items()}
    return {"step": trainer.state.global_step, **figures}


# What is run, its arms, the seeds of the docs, and the digits of its table
EXPERIMENTS = {
    "methods": (compare_methods, METHODS, 3, 2),
    "prescreening": (prescreen, PRESCREENING, 5, 3),
    "few_right": (prescreen, FEW_RIGHT, 3, 3),
    "stop_cost": (learn_to_stop, STOP_COST, 1, 2),
    "warm_start": (start_warm, WARM_START, 3, 2),
    "latent_rl": (hack_rewards, LATENT_RL, 3, 3),
}


@dataclass
class SmallWorldArguments:
    """Arguments of this script."""

    experiment: str = field(metadata={"help": "Which of them.", "choices": list(EXPERIMENTS)})
    arms: list[str] = field(default_factory=list, metadata={"help": "Arms of it. If none, all."})
    seeds: list[int] = field(default_factory=list, metadata={"help": "Seeds. If none, those of the docs."})
    steps: float = field(default=1.0, metadata={"help": "Factor of all numbers of steps, below 1 for a quick look."})
    output_json: str | None = field(default=None, metadata={"help": "File for the figures."})

    def __post_init__(self):
        check_output(self.output_json)


def cell(name: str, values: list[int | float], digits: int) -> str:
    """Figures of all seeds, or their mean."""
    if name in ("mean accuracy", "seconds"):
        return f"{statistics.fmean(values):.{0 if name == 'seconds' else digits}f}"
    if isinstance(values[0], int):
        return " / ".join(f"{value:,}" for value in (values if len(set(values)) > 1 else values[:1]))
    return " / ".join(f"{value:.{digits}f}" for value in values)


def main(args: SmallWorldArguments) -> None:
    run, arms, num_seeds, digits = EXPERIMENTS[args.experiment]
    args.arms, args.seeds, results = args.arms or list(arms), args.seeds or list(range(num_seeds)), {}
    with tempfile.TemporaryDirectory(prefix="small-world-") as folder:
        os.environ.setdefault("TRAINED_MODELS", folder)
        for arm in args.arms:
            numbers = {name: value for name, value in arms[arm].items() if name.endswith(("_steps", "_rollouts"))}
            settings = arms[arm] | {name: max(1, round(args.steps * value)) for name, value in numbers.items()}
            results[arm] = []
            for seed in args.seeds:
                results[arm].append(run(tempfile.mkdtemp(dir=folder), seed, **settings))
                print(f"{arm}, seed {seed}: {results[arm][-1]}", flush=True)
    names = list(results[args.arms[0]][0])
    rows = [["", *names]]
    for arm, of_seeds in results.items():
        rows.append([arm, *(cell(name, [figures[name] for figures in of_seeds], digits) for name in names)])
    if args.experiment == "latent_rl":  # whose rows are figures
        rows = list(zip(*rows, strict=True))
    rows.insert(1, ["---"] * len(rows[0]))
    print(f"\n{args.experiment}, seeds {args.seeds}\n", *(f"| {' | '.join(row)} |" for row in rows), sep="\n")
    write_json(args, "small_world", "tests/tiny.py", results)


if __name__ == "__main__":
    main(*HfArgumentParser(SmallWorldArguments).parse_args_into_dataclasses())
