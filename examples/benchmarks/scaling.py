# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
How the time of an optimizer step of `LatentGRPOTrainer` grows.

One quantity is varied at a time: the number G of trajectories at a fixed number K of decoded ones, K at a fixed G, the
number T of latents, the length of the prompt and that of the completion. For each, two fits over the medians: a line
(seconds per unit, seconds at zero, R²), and the exponent of a power law (slope in log-log): below 1 means slower than
proportionally. Settings are visited in rounds, so that a machine that slows down does so for all of them.

The claims: less than linear in G at fixed K, and linear in K.

    python examples/benchmarks/scaling.py                                      # CPU, SmolLM2-135M-Instruct
    python examples/benchmarks/scaling.py --vary g k --rounds 3 --output_json scaling.json --output_png scaling.png

On a GPU, a LLaMA-2-7B with a 1.3B assistant, random weights, nothing downloaded:

    python examples/benchmarks/scaling.py --shape llama2-7b --assistant_shape llama-1.3b --latent_dim 512 \
        --latent_sampling autoregressive --g_values 16 32 64 128 256 --output_png scaling.png
"""

import dataclasses
import gc
import math
from dataclasses import dataclass, field

import common
import torch
from transformers import HfArgumentParser


VARIED = {
    "g": "G, trajectories (K fixed)",
    "k": "K, decoded trajectories (G fixed)",
    "t": "T, latents",
    "prompt": "prompt tokens",
    "completion": "completion tokens",
}


@dataclass
class ScalingArguments(common.TrainingBenchmarkArguments):
    """Arguments of this script. What is not varied stays at the benchmarks' common values."""

    vary: list[str] = field(
        default_factory=lambda: list(VARIED), metadata={"help": "What to vary.", "choices": list(VARIED)}
    )
    num_decoded: int = field(default=8, metadata={"help": "K, where it is not varied."})
    g_values: list[int] = field(default_factory=lambda: [16, 32, 64, 128], metadata={"help": "Values of G."})
    k_values: list[int] = field(default_factory=lambda: [4, 8, 16, 32], metadata={"help": "Values of K."})
    t_values: list[int] = field(default_factory=lambda: [2, 4, 8, 16], metadata={"help": "Values of T."})
    prompt_values: list[int] = field(default_factory=lambda: [64, 128, 256], metadata={"help": "Prompt lengths."})
    completion_values: list[int] = field(
        default_factory=lambda: [16, 32, 64, 128], metadata={"help": "Completion lengths."}
    )
    rounds: int = field(default=2, metadata={"help": "Visits to each setting, `repeats` steps each."})
    repeats: int = 3
    max_completion_length: int = 32

    def setting(self, varied: str, value: int) -> "ScalingArguments":
        """These arguments with one quantity changed."""
        names = {
            "g": "num_generations",
            "k": "num_decoded",
            "t": "num_latents",
            "prompt": "prompt_tokens",
            "completion": "max_completion_length",
        }
        setting = dataclasses.replace(self, **{names[varied]: value})
        setting.prescreening_fraction = min(setting.num_decoded / setting.num_generations, 1.0)
        return setting


def fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Slope, intercept and R² of the least-squares line."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    intercept = mean_y - slope * mean_x
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return slope, intercept, 1 - left / sum((b - mean_y) ** 2 for b in y)


def step_seconds(args: ScalingArguments, main_model, tokenizer) -> list[float]:
    clock = common.StepClock()
    num_steps = args.warmup + args.repeats
    trainer = common.latent_trainer(args, main_model, tokenizer, common.digit_reward, num_steps, [clock])
    trainer.train()
    del trainer
    gc.collect()  # a trainer refers to itself: the next one should not find its memory taken
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return clock.seconds[args.warmup :]


def main(args: ScalingArguments) -> None:
    main_model, tokenizer, model_name = common.load_main_model(args)
    seconds = {(varied, value): [] for varied in args.vary for value in getattr(args, f"{varied}_values")}
    for _ in range(args.rounds):
        for varied, value in seconds:
            seconds[varied, value] += step_seconds(args.setting(varied, value), main_model, tokenizer)

    figures = {}
    for varied in args.vary:
        values = getattr(args, f"{varied}_values")
        by_value = {value: common.summary(seconds[varied, value]) for value in values}
        medians = [by_value[value]["median"] for value in values]
        slope, intercept, r_squared = fit(values, medians)
        exponent, _, _ = fit([math.log(value) for value in values], [math.log(median) for median in medians])
        figures[varied] = {
            "step_seconds": by_value,
            "slope_seconds": slope,
            "intercept_seconds": intercept,
            "r_squared": r_squared,
            "exponent": exponent,
        }
        rows = [[str(value), common.spread(by_value[value])] for value in values]
        common.print_table(f"{VARIED[varied]}: {common.describe(args, model_name)}", ["", "step, seconds"], rows)
        print(f"exponent {exponent:.2f}; line {intercept:.3g} s + {slope:.3g} s per unit, R² {r_squared:.3f}")

    common.write_json(args, "scaling", model_name, figures)
    if args.output_png is not None:
        plot(args, model_name, figures)


def plot(args: ScalingArguments, model_name: str, figures: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(figures), figsize=(3.4 * len(figures), 3.4), squeeze=False)
    for axis, (varied, result) in zip(axes[0], figures.items(), strict=True):
        values = list(result["step_seconds"])
        medians = [s["median"] for s in result["step_seconds"].values()]
        below = [s["median"] - s["min"] for s in result["step_seconds"].values()]
        above = [s["max"] - s["median"] for s in result["step_seconds"].values()]
        axis.errorbar(values, medians, yerr=[below, above], marker="o", capsize=3)
        ends = [0, max(values)]
        line = [result["intercept_seconds"] + result["slope_seconds"] * end for end in ends]
        axis.plot(ends, line, linestyle=":", color="gray", label="line")
        axis.plot(ends, [0, medians[0] / values[0] * max(values)], linestyle="--", color="lightgray", label="∝")
        axis.set_ylim(0, 1.3 * max(medians))  # proportional growth may leave the picture
        axis.set_xlabel(VARIED[varied])
        axis.set_title(f"exponent {result['exponent']:.2f}")
        axis.legend()
    axes[0][0].set_ylabel("seconds per step")
    figure.suptitle(model_name)
    figure.tight_layout()
    figure.savefig(args.output_png, dpi=120)


if __name__ == "__main__":
    main(*HfArgumentParser(ScalingArguments).parse_args_into_dataclasses())
