# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
How many answers of the main model it takes to learn the small world of tests/tiny.py to 0.9, with which settings.

    python examples/benchmarks/decodes.py --runs docs/benchmarks/decodes.jsonl    # a quarter of an hour on two cores
    python examples/benchmarks/decodes.py --runs decodes.jsonl --arms preset "ε = 0.2" --seeds 0 1

The preset, what it becomes where one of its settings is another, and what was tried beside it and is not part of the
package: groups that are drawn again where their rewards are alike, passes over the rollout before with its own ratios, a
learned baseline in place of the group's mean. All 160 held-out questions are answered after every 500 decodes, with sampled
latents and with their means; what counts is the first time that 0.9 are right. Printed: a markdown table, means and 95%
intervals by Student's t over seeds. Where a run does not get there within `limit`, the mean is of as many at least. CPU seconds are of
training until both are there, or until `limit`. The preset was chosen on seeds 0 to 9; the table is of others.
"""

import io
import os
import statistics
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from common import run_missing
from datasets import Dataset
from small_world import questions
from torch.nn.functional import mse_loss, pad
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback

from tests.learners import make_learner
from tests.tiny import tiny_reward
from trl_dlr import LatentGRPOTrainer
from trl_dlr.evaluation import evaluate_latents, mean_interval


# ---- What was tried: the trainer's hooks, in examples alone ----


class DrawnAgainTrainer(LatentGRPOTrainer):
    """Groups whose rewards are alike are drawn again, twice at most: all of them, or those that are all wrong."""

    ALL_WRONG_ONLY = False

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        groups = self._rollout.rewards.view(-1, self.num_generations).clone()
        for _ in range(2):
            is_alike = groups.std(dim=1) == 0
            if self.ALL_WRONG_ONLY:
                is_alike &= groups[:, 0] < 0
            alike = is_alike.nonzero().squeeze(1)
            if len(alike) == 0:
                break
            rows = torch.arange(len(inputs)).view(-1, self.num_generations)[alike].flatten()
            again = super()._generate_and_score_completions([inputs[row] for row in rows.tolist()])
            groups[alike] = self._rollout.rewards.view(-1, self.num_generations)
            width = max(output["decoded_ids"].size(1), again["decoded_ids"].size(1))
            for found in (output, again):  # completions of one draw may be longer than those of another
                found["decoded_ids"] = pad(found["decoded_ids"], (0, width - found["decoded_ids"].size(1)), value=-100)
            for name, values in again.items():
                if isinstance(values, torch.Tensor) and values.dim() > 0 and len(values) == len(rows):
                    output[name][rows] = values
        return output


class WrongDrawnAgainTrainer(DrawnAgainTrainer):
    ALL_WRONG_ONLY = True


class ReuseTrainer(LatentGRPOTrainer):
    """The last four passes of a rollout are over the one before, whose ratios are to the policy that drew it."""

    present = previous = None

    def _prepare_inputs(self, generation_batch):
        step = self._step % self.num_iterations  # where a rollout has one step a pass
        if step == 0:
            self.previous = self.present
        self.present = super()._prepare_inputs(generation_batch)
        return self.previous if self.previous is not None and step >= self.num_iterations - 4 else self.present


class LearnedBaselineTrainer(LatentGRPOTrainer):
    """Advantages are rewards less what a head predicts from the question's state; groups have no mean of their own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        size = self.policy.config.hidden_size
        layers = torch.nn.LayerNorm(size), torch.nn.Linear(size, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)
        self.head = torch.nn.Sequential(*layers)
        self.head_optimizer = torch.optim.AdamW(self.head.parameters(), lr=3e-3)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        states, rewards = self._rollout.drawn.question_states.float(), self._rollout.rewards
        advantages = rewards - self.head(states).squeeze(1).detach()
        output["advantages"] = advantages / (advantages.std() + 1e-4)
        with torch.enable_grad():
            for _ in range(20):
                mse_loss(self.head(states).squeeze(1), rewards).backward()
                self.head_optimizer.step()
                self.head_optimizer.zero_grad()
        return output


# ---- Arms ----

PRESET = {"per_device_train_batch_size": 256, "num_generations": 8, "num_iterations": 8, "learning_rate": 1e-3}
PRESET |= {"epsilon": 0.4, "hybrid_coef": 0.3}
BEFORE = {"num_generations": 16, "num_iterations": 4, "learning_rate": 3e-4, "epsilon": 0.2, "hybrid_coef": 0.0}
SIX_OF_32 = {"num_generations": 32, "per_device_train_batch_size": 1024}
SIX_OF_32 |= {"prescreening_fraction": 0.18, "prescreening_warmup_rollouts": 2}
CHANGES = {
    "before": BEFORE,
    "preset": {},
    "no hybrid term": {"hybrid_coef": 0.0},
    "hybrid term of weight 0.1": {"hybrid_coef": 0.1},
    "hybrid term of weight 1": {"hybrid_coef": 1.0},
    "ε = 0.2": {"epsilon": 0.2},
    "ε = 0.8": {"epsilon": 0.8},
    "4 passes": {"num_iterations": 4},
    "16 passes": {"num_iterations": 16},
    "rate 3e-4": {"learning_rate": 3e-4},
    "groups of 4": {"num_generations": 4},
    "groups of 16": {"num_generations": 16},
    "batches of 128": {"per_device_train_batch_size": 128},
    "two updates a pass, 4 passes": {
        "per_device_train_batch_size": 128,
        "steps_per_generation": 2,
        "num_iterations": 4,
    },
    "σ learned": {"learn_sigma": True},
    "autoregressive": {"latent_sampling": "autoregressive"},
    "6 of 32 decoded": SIX_OF_32,
    "groups drawn again": {"trainer": "DrawnAgainTrainer"},
    "wrong groups drawn again": {"trainer": "WrongDrawnAgainTrainer"},
    "4 passes over the rollout before": {"num_iterations": 12, "trainer": "ReuseTrainer"},
    "learned baseline": {"trainer": "LearnedBaselineTrainer"},
}
ARMS = {arm: {**PRESET, **change} for arm, change in CHANGES.items()}


@dataclass
class DecodesArguments:
    """Arguments of this script."""

    runs: str = field(metadata={"help": "File with a line of JSON for each run; what it has is not run again."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Arms.", "choices": list(ARMS)})
    seeds: list[int] = field(default_factory=lambda: list(range(10, 15)), metadata={"help": "Seeds."})
    limit: int = field(default=20_000, metadata={"help": "Decodes after which a run is given up."})
    workers: int = field(default=2, metadata={"help": "Processes side by side, of one thread each."})


# ---- A run ----


class UntilLearned(TrainerCallback):
    """Held-out accuracies after every 500 decodes, until both are 0.9 or the limit is reached."""

    def __init__(self, trainer: LatentGRPOTrainer, limit: int):
        self.trainer, self.limit, self.points = trainer, limit, []
        self.of_evaluations, self.seconds, self.start = 0, 0.0, time.process_time()
        self.test = Dataset.from_list(questions(0))

    def on_step_end(self, args, state, control, **kwargs):
        decodes = self.trainer.engine.num_decoded - self.of_evaluations
        rollouts, is_within = divmod(state.global_step, args.num_iterations * args.steps_per_generation)
        if is_within or decodes // 500 == self.last // 500:
            return
        self.seconds += time.process_time() - self.start
        point = {"decodes": decodes, "rollouts": rollouts, "seconds": self.seconds}
        with self.trainer.answering() as reasoner, torch.random.fork_rng(), redirect_stderr(io.StringIO()):
            for control_name in ("policy", "mean_latents"):
                found = evaluate_latents(
                    reasoner, self.test, tiny_reward, control=control_name, batch_size=160, seed=0
                )
                point[control_name] = found["accuracy"]
        self.points.append(point)
        self.of_evaluations = self.trainer.engine.num_decoded - decodes
        is_learned = all(self.decodes_to(name) < self.limit for name in ("policy", "mean_latents"))
        control.should_training_stop = is_learned or decodes >= self.limit
        self.start = time.process_time()

    @property
    def last(self) -> int:
        return self.points[-1]["decodes"] if self.points else 0

    def decodes_to(self, control: str) -> int:
        learned = (point["decodes"] for point in self.points if point[control] >= 0.9)
        return min(next(learned, self.limit), self.limit)


def run(arm: str, config: dict[str, Any], seed: int, limit: int) -> dict[str, Any]:
    settings = {"latent_sampling": "parallel", "exploration_check_prompts": 0, "lr_scheduler_type": "constant"}
    settings |= {"max_steps": 1_000_000, "seed": seed, **config}
    trainer_class = globals()[settings.pop("trainer", "LatentGRPOTrainer")]
    with tempfile.TemporaryDirectory() as folder:
        dataset = Dataset.from_list(questions(1, 2, 3, 4))
        trainer = make_learner(folder, seed, dataset=dataset, trainer_class=trainer_class, **settings)
        trainer.remove_callback(PrinterCallback)
        watch = UntilLearned(trainer, limit)
        trainer.add_callback(watch)
        trainer.train()
    reached = {f"decodes, {name}": watch.decodes_to(name) for name in ("mean_latents", "policy")}
    return {**reached, "seconds": watch.seconds, "curve": watch.points}


def main(args: DecodesArguments) -> None:
    settings = [
        {"arm": arm, "config": ARMS[arm], "seed": seed, "limit": args.limit}
        for arm in args.arms
        for seed in args.seeds
    ]
    runs = run_missing(run, settings, args.runs, args.workers)
    titles = {"decodes, mean_latents": "means of the latents", "decodes, policy": "sampled latents"}
    print(
        f"\n| decodes to 0.9 | {' | '.join(titles.values())} | seeds, sampled | CPU seconds |\n|---|---|---|---|---|"
    )
    for arm in args.arms:
        own = [line for line in runs if line["arm"] == arm]
        cells = []
        for name in titles:
            values = [line[name] for line in own]
            mean, low, _ = mean_interval(values) if len(values) > 1 else (values[0], values[0], 0)
            is_whole = max(values) < args.limit
            cells.append(f"{mean:,.0f} ± {mean - low:,.0f}" if is_whole else f"≥ {mean:,.0f}")
        seeds = " / ".join(f"{line['decodes, policy']:,}" for line in own)
        print(f"| {arm} | {' | '.join(cells)} | {seeds} | {statistics.fmean(line['seconds'] for line in own):.1f} |")


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(DecodesArguments).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory(prefix="decodes-") as main_models:
        os.environ.setdefault("TRAINED_MODELS", main_models)
        os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        main(arguments)
