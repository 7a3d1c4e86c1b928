# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
What a step takes on more GPUs than were at hand: a prediction from parts that were measured on one.

    python examples/benchmarks/simulation.py            # docs/benchmarks/gpu_h100.json, as gpu.py has measured it
    python examples/benchmarks/simulation.py --check    # on CPUs: predictions beside runs, with 1 and 2 processes

Each GPU has one question of G = 64 trajectories per step, of which K are decoded, with the paper's assistant (1.3B,
T = 32). A step is the sum of its parts:

- Sampling, reward and update take what they took on one GPU: each GPU does its own.
- A token of all of a GPU's rows takes `a · layers + (weights + rows · positions · KV cache per position) / b`. The
  kernels' time per layer `a` and the bandwidth `b` are a least-squares fit to the measurements. A main model of 70B is
  split over 8 GPUs, which decode the rows of all 8: weights and cache are read in 8 parts, and each layer waits twice
  for a sum over the GPUs.
- The sum of the gradients over N GPUs, in bfloat16, takes `2 (N - 1) / N · bytes / bandwidth`, as in a ring.

What was not measured is an argument: `--node_bandwidth` and `--network_bandwidth` (GB per second and GPU, within a node
of 8 and beyond), `--layer_sum` (seconds for one sum within a layer).

`--check` measures parts with one process and one thread, SmolLM2, K = 6 and K = 12, predicts a step with K = 24 and one
with two processes, and runs both.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from transformers import AutoConfig, HfArgumentParser


MEASURED = Path(__file__).parents[2] / "docs" / "benchmarks" / "gpu_h100.json"
PROMPT, NUM_LATENTS, NUM_NEW, GROUP, NUM_DECODED = 150, 32, 256, 64, 12  # as in gpu.py
POSITIONS = PROMPT + NUM_LATENTS + NUM_NEW / 2  # that a new token looks back on, in the mean
MAIN_MODELS = {"llama-1.3b": 1, "llama2-7b": 1, "llama2-70b": 8}  # GPUs that hold one together
NUM_GPUS = (1, 8, 16, 64)
NODE = 8


@dataclass
class SimulationArguments(common.TrainingBenchmarkArguments):
    """Arguments of this script."""

    measured: str = field(default=str(MEASURED), metadata={"help": "File with the parts of a step on one GPU."})
    node_bandwidth: float = field(default=300.0, metadata={"help": "GB per second and GPU within a node."})
    network_bandwidth: float = field(default=40.0, metadata={"help": "GB per second and GPU between nodes."})
    layer_sum: float = field(default=20e-6, metadata={"help": "Seconds for a sum over the GPUs of one main model."})
    check: bool = field(default=False, metadata={"help": "Compare predictions with runs on this machine's CPUs."})
    worker: bool = field(default=False, metadata={"help": "Measure a step in this process, for `check`."})


# ---- On GPUs ----


def sizes(shape: str, num_layers: int | None = None) -> tuple[int, float, float]:
    """Layers, bytes of weights that a token reads, and bytes of KV cache per row and position, in bfloat16."""
    config = AutoConfig.for_model(**{"model_type": "llama", **common.SHAPES[shape]})
    layers, hidden, heads = num_layers or config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    kv = 2 * hidden * config.num_key_value_heads // heads
    per_layer = hidden * (2 * hidden + kv + 3 * config.intermediate_size)
    return layers, 2.0 * (layers * per_layer + hidden * config.vocab_size), 2.0 * layers * kv


def fit(decoding: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Seconds per layer, bytes per second, and the largest relative error of the fit."""
    rows, seconds = [], []
    for each in decoding:
        layers, weights, cache = sizes(each["shape"], each["num_layers"])
        rows.append([layers, weights + each["num_rows"] * POSITIONS * cache])
        seconds.append(each["seconds"] / NUM_NEW)
    matrix, target = np.array(rows), np.array(seconds)
    scaled = matrix / target[:, None]  # relative errors count alike
    (per_layer, per_byte), *_ = np.linalg.lstsq(scaled, np.ones(len(target)), rcond=None)
    return per_layer, 1 / per_byte, np.abs(scaled @ [per_layer, per_byte] - 1).max()


def predict(
    args: SimulationArguments, measured: dict[str, Any], shape: str, num_gpus: int, num_decoded: int
) -> dict[str, float]:
    """Seconds of each part of a step."""
    per_layer, bandwidth, _ = fit(measured["decoding"])
    together, (layers, weights, cache) = MAIN_MODELS[shape], sizes(shape)
    # `together` GPUs share one main model and the rows of all of them
    token = per_layer * layers + (weights / together + num_decoded * POSITIONS * cache) / bandwidth
    token += 2 * layers * args.layer_sum * (together > 1)
    step = measured["step_7b"]
    _, gradients, _ = sizes("llama-1.3b")  # in bfloat16, as the weights; embeddings are frozen
    slowest = (args.node_bandwidth if num_gpus <= NODE else args.network_bandwidth) * 1e9
    return {
        "decoding": NUM_NEW * token,
        "sampling": step["time/sample"],
        "update": step["time/optimize"],
        "sum of gradients": 2 * (num_gpus - 1) / num_gpus * gradients / slowest,
        "reward": step["time/reward"],
    }


def simulate(args: SimulationArguments) -> None:
    measured = json.loads(Path(args.measured).read_text())
    per_layer, bandwidth, error = fit(measured["decoding"])
    print(
        f"{measured['device']}: {1e6 * per_layer:.0f} µs per layer and {bandwidth / 1e9:,.0f} GB per second "
        f"({bandwidth / 1e9 / measured['copy_gb_per_second']:.0%} of copying); the fit is off by {error:.0%} at most"
    )
    figures = {}
    for num_decoded in (NUM_DECODED, GROUP):
        rows = []
        for shape, together in MAIN_MODELS.items():
            for num_gpus in NUM_GPUS:
                if num_gpus < together:
                    continue
                parts = predict(args, measured, shape, num_gpus, num_decoded)
                seconds = sum(parts.values())
                figures[f"{shape}, {num_gpus} GPUs, K = {num_decoded}"] = {**parts, "seconds": seconds}
                shares = [f"{parts[name] / seconds:.0%}" for name in list(parts)[:4]]
                rows.append([shape, str(num_gpus), f"{seconds:.2f}", *shares, f"{num_gpus * GROUP / seconds:,.0f}"])
        columns = ["main model", "GPUs", "seconds per step", *list(parts)[:4], "trajectories per second"]
        common.print_table(f"Predicted, G = {GROUP}, K = {num_decoded} per GPU", columns, rows)
    common.write_json(args, "simulation", "", figures)


# ---- The same arithmetic beside runs on CPUs ----


def work(args: SimulationArguments) -> None:
    """Steps of this process, and of those that it runs with; the first one prints what they took."""
    common.SCRATCH.name = str(Path(args.output_json).parent)  # one folder for all processes
    main_model, tokenizer, _ = common.load_main_model(args)
    clock, num_steps = common.StepClock(), args.warmup + args.repeats
    trainer = common.latent_trainer(args, main_model, tokenizer, common.digit_reward, num_steps, [clock])
    trainer.train()
    seconds_of_sum = [0.0]
    if trainer.accelerator.num_processes > 1:
        gradients = torch.zeros(sum(p.numel() for p in trainer.model.parameters() if p.requires_grad))
        seconds_of_sum = []
        for _ in range(args.repeats):
            trainer.accelerator.wait_for_everyone()
            start = common.now()
            torch.distributed.all_reduce(gradients)
            seconds_of_sum.append(common.now() - start)
    logs = [log for log in trainer.state.log_history if "loss" in log][args.warmup :]
    result = {name: statistics.median(log[name] for log in logs) for name in logs[0] if name.startswith("time/")}
    result |= {"seconds": statistics.median(clock.seconds[args.warmup :]), "sum": statistics.median(seconds_of_sum)}
    if trainer.accelerator.is_main_process:
        Path(args.output_json).write_text(json.dumps(result))


def measure(args: SimulationArguments, num_decoded: int, num_processes: int) -> dict[str, float]:
    """A run of `work` in processes of its own, with one thread each."""
    path = Path(common.SCRATCH.name, "step.json")
    options = {"worker": True, "dtype": args.dtype, "repeats": args.repeats, "output_json": path}
    options["prescreening_fraction"] = num_decoded / args.num_generations
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_processes]
    command += [__file__, *(part for name, value in options.items() for part in (f"--{name}", value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(list(map(str, command)), env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())


def check(args: SimulationArguments) -> None:
    few, more = measure(args, 6, 1), measure(args, 12, 1)
    per_row = (more["time/decode"] - few["time/decode"]) / 6
    many, two = measure(args, 24, 1), measure(args, 6, 2)
    rows = [
        ["K = 24", few["seconds"] + 18 * per_row, many["seconds"]],
        ["two processes, K = 6 each", few["seconds"] + two["sum"], two["seconds"]],
    ]
    print(f"Measured: K = 6 {few['seconds']:.2f} s, K = 12 {more['seconds']:.2f} s; a sum {two['sum']:.3f} s")
    table = [[name, f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}"] for name, a, b in rows]
    common.print_table("Seconds per step on CPUs", ["", "predicted", "measured", "predicted / measured"], table)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(SimulationArguments).parse_args_into_dataclasses()
    if arguments.worker:
        work(arguments)
    elif arguments.check:
        check(arguments)
    else:
        simulate(arguments)
