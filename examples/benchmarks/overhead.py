# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
How much an optimizer step of `LatentGRPOTrainer` adds to the work that it consists of.

After every step of `trainer.train()`, its parts are done again on their own, with the tensors of that very step: the
main model decodes the same K rows (`engine.generate`), the assistant samples the same number of trajectories
(`policy.sample`), and plain torch scores the latents that the trainer scored: forward, backward, `optimizer.step()`
and `zero_grad()` on a copy of the policy. Then

    overhead = step / (decode + sample + score) - 1

A step's time runs from the end of the last one to its own end: tokenizing, pre-screening and its value head, rewards
(a cheap one here), advantages, losses, gradient clipping, metrics, logging and fetching data are all overhead. At most
10 % is the target.

    python examples/benchmarks/overhead.py                                        # CPU, SmolLM2-135M-Instruct
    python examples/benchmarks/overhead.py --latent_sampling autoregressive --repeats 20 --output_json overhead.json

On a GPU, a LLaMA-2-7B with a 1.3B assistant, random weights, nothing downloaded:

    python examples/benchmarks/overhead.py --shape llama2-7b --assistant_shape llama-1.3b --num_generations 64 \
        --num_latents 32 --latent_dim 512 --latent_sampling autoregressive --max_completion_length 256 \
        --prompt_tokens 150
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import common
import torch
from transformers import HfArgumentParser


@dataclass
class OverheadArguments(common.TrainingBenchmarkArguments):
    """Arguments of this script."""

    repeats: int = 10
    warmup: int = 2


class Recorder:
    """Passes calls on, and remembers the latest one so that it can be made again."""

    def __init__(self, function: Callable):
        self.function = function
        self.call = None

    def __call__(self, *args, **kwargs):
        self.call = args, kwargs
        return self.function(*args, **kwargs)

    def again(self):
        args, kwargs = self.call
        return self.function(*args, **kwargs)


class Parts:
    """The parts of a step, each done again on its own and timed."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {"decode": [], "sample": [], "score": []}

    def attach(self, trainer) -> None:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        trainer.engine.generate = self.generate = Recorder(trainer.engine.generate)
        policy.sample = self.sample = Recorder(policy.sample)
        policy.register_forward_pre_hook(self._remember_scoring, with_kwargs=True)
        self.autocast = trainer.accelerator.autocast

    def _remember_scoring(self, policy, args, kwargs):
        if torch.is_grad_enabled():  # else it is sampling
            self.scoring = kwargs

    def score(self) -> None:
        with self.autocast():
            density = self.policy(**self.scoring).density
        loss = -density.log_prob(self.scoring["latents"]).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self) -> None:
        parts = {"decode": self.generate.again, "sample": self.sample.again, "score": self.score}
        for name, part in parts.items():
            start = common.now()
            part()
            self.seconds[name].append(common.now() - start)


def main(args: OverheadArguments) -> None:
    main_model, tokenizer, model_name = common.load_main_model(args)
    parts = Parts()
    clock = common.StepClock(between=parts.measure)
    num_steps = args.warmup + args.repeats
    trainer = common.latent_trainer(args, main_model, tokenizer, common.digit_reward, num_steps, [clock])
    # A copy of its own, whose forward accelerate has not wrapped
    parts.policy = copy.deepcopy(trainer.model)
    parts.optimizer = torch.optim.AdamW([p for p in parts.policy.parameters() if p.requires_grad], lr=1e-5)
    parts.attach(trainer)
    trainer.train()

    step = clock.seconds[args.warmup :]
    seconds = {name: values[args.warmup :] for name, values in parts.seconds.items()}
    sums = [sum(values) for values in zip(*seconds.values(), strict=True)]
    overheads = [whole / pure - 1 for whole, pure in zip(step, sums, strict=True)]
    logs = [logs for logs in trainer.state.log_history if "loss" in logs][args.warmup :]
    figures = {
        "step_seconds": common.summary(step),
        **{f"{name}_seconds": common.summary(values) for name, values in seconds.items()},
        "parts_seconds": common.summary(sums),
        "overhead": common.summary(overheads),
        "overhead_seconds": common.summary([whole - pure for whole, pure in zip(step, sums, strict=True)]),
        "trainer_breakdown_seconds": {
            name: common.summary([log[name] for log in logs]) for name in logs[0] if name.startswith("time/")
        },
    }
    k = trainer.args.num_decoded
    setting = f"G {args.num_generations}, K {k}, {args.max_completion_length} new tokens, {args.latent_sampling}"
    rows = [[name, common.spread(value)] for name, value in figures.items() if "median" in value]
    rows += [[f"  {name}", common.spread(value)] for name, value in figures["trainer_breakdown_seconds"].items()]
    common.print_table(f"{common.describe(args, model_name)}\n{setting}", ["", "median (min..max)"], rows)
    print(f"Overhead: {figures['overhead']['median']:.1%} (target: at most 10%)")
    figures["num_decoded_per_question"] = k
    common.write_json(args, "overhead", model_name, figures)
    bars = {name: figures[f"{name}_seconds"] for name in ("step", "parts", *seconds)}
    common.bar_plot(args, f"{model_name}: {setting}", {"seconds": bars})


if __name__ == "__main__":
    main(*HfArgumentParser(OverheadArguments).parse_args_into_dataclasses())
