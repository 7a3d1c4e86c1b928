# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
The claims of the paper DeepLatent Reasoning (arXiv 2601.17275), tested one by one in the small world of tests/tiny.py.

    python examples/benchmarks/paper_tables.py --runs tables.jsonl            # 80 minutes on two cores
    python examples/benchmarks/paper_tables.py --runs quick.jsonl --quick     # minutes: fewer seeds, smaller budgets
    python examples/benchmarks/paper_tables.py --runs tables.jsonl --tables table3 stability

A question is `[letter][a][b]`, and the letter decides the operation. Pairs of operands are held out. Three main models:

- `told`: it calculates after `[op][op]`, and does not know whose operation is which, nor how to write one.
- `thinks`: it writes an operation at random before its result, `[op][op]=x`: whoever trains its tokens can learn to
  write the right one.
- `steps`: the same with two results in a row, `[op][op]=x=y`; a checker reads both, the reward only y.

All arms of a table have the same questions, and are judged alike. A rival of DLR trains all weights of the main model,
with the learning rate and then the passes that were best in the mean of two pilot seeds, for either budget. Seconds are
CPU seconds of training alone. In the first three tables a rival goes on until it has spent both budgets: as many decodes
as all have, and the CPU seconds that DLR with pre-screening took for them. Accuracy is of either budget; skill, steps, samples, and
`shuffled`, which are latents of other questions, are of the end. Seeds are others than those that DLR's settings were
chosen on, and the main model of a world is always the same. Each run is one line in `--runs`, and what is there is not
run again. Printed: markdown tables, mean and 95% interval by Student's t over seeds.
"""

import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from common import check_output, run_missing, write_json
from paper_arms import AT_18, CONTRAST, DLR, HYBRID, NUM_POINTS, PRESCREENED, RIVALS, at, run
from transformers import HfArgumentParser

from trl_dlr.evaluation import mean_interval


RATES, BETA = (3e-5, 1e-4, 3e-4), 0.04
FIRST_PASSES, PASSES = 8, (4, 16)  # the rate is chosen with the first
FEW_PASSES, HIGH_RATE = (1, 2), 1e-3  # for CPU seconds, beside the others
PILOT_SEEDS, FIRST_SEED = (100, 101), 10  # decodes.py has chosen DLR's settings on seeds 0 to 9
MAIN_MODEL_RATES = (1e-5, 1e-4)
NUM_TOKENS, NUM_LATENTS = (2, 4, 8, 16, 32), (1, 2, 4, 8)
SAMPLES = 64
MOST_FREQUENT = f"majority@{SAMPLES}"
IN_DLRS_SECONDS, BELOW_BEST = "in DLR's seconds", "below its best"

CLOCK = "DLR, K/G = 0.18"  # whose CPU seconds all have

TABLES = ("table3", "stability", "variance", "table4", "contrastive", "test_time", "steps")
SIZES = {  # at full size and quick
    "seeds": (5, 2),
    "decodes": (24_000, 6_000),
    "short_decodes": (8_000, 4_000),  # of tables that compare DLR with itself
    "pilot_decodes": (16_000, 4_000),
    "estimates": (64, 16),
}

# CPU minutes that each part takes at full size, and the tables that need it
PARTS = {
    "pilot, told": (27, {"table3", "stability", "test_time"}),
    "pilot, thinks": (29, {"table3", "stability", "test_time"}),
    "pilot, steps": (8, {"steps"}),
    "told": (29, {"table3", "stability", "test_time"}),
    "thinks": (34, {"table3", "stability", "test_time"}),
    "variance": (8, {"variance"}),
    "table4": (5, {"table4"}),
    "contrastive": (14, {"contrastive"}),
    "steps": (6, {"steps"}),
}


# ---- Plans: which runs a table needs ----


def main_settings(args, make: Callable, world: str, seconds: float, rivals: dict[str, dict]) -> list[dict]:
    """DLR's own arms spend the decodes alone: where they decode all, that takes them less time than the clock's."""
    ours = {CLOCK: {**DLR, **PRESCREENED}, "DLR": DLR, "DLR, groups of 32": {**DLR, "num_generations": 32}}
    ours |= {"DLR, contrastive": {**DLR, **CONTRAST}}
    arms = [(arm, config, seconds) for arm, config in {"untrained": {}, **rivals}.items()]
    arms += [(arm, config, 0.0) for arm, config in ours.items()]
    return [make(world, arm, config, args.size("decodes"), most, SAMPLES) for arm, config, most in arms]


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


def in_dlrs_seconds(arms: dict[str, list[dict]]) -> None:
    """Beside the accuracy after as many decodes, the one after the CPU seconds that DLR takes, between two points."""
    seconds = statistics.fmean(line["seconds"] for line in arms["DLR"])
    for line in itertools.chain(*arms.values()):
        points = [[point[name] for point in line["curve"]] for name in ("seconds", "accuracy")]
        line[IN_DLRS_SECONDS] = float(np.interp(seconds, *points))


def best(tried: list[dict], budget: str) -> dict:
    return max(tried, key=lambda one: statistics.fmean(one[budget]))["config"]


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
    seeds = range(FIRST_SEED, FIRST_SEED + args.size("seeds"))
    if not args.quick:
        plan = {name: minutes for name, (minutes, tables) in PARTS.items() if wanted & tables}
        print(f"Plan: {sum(plan.values())} CPU minutes over {args.workers} processes, {plan}", flush=True)

    def make(world, arm, config, decodes, seconds=0.0, samples=0):
        shared = {"kind": "learn", "world": world, "arm": arm, "config": config}
        return {**shared, "decodes": decodes, "seconds": seconds, "samples": samples}

    def of_seeds(settings: list[dict], seeds: Sequence[int] = seeds) -> list[dict]:
        return [{**each, "seed": seed} for seed in seeds for each in settings]

    def make_runs(name: str, settings: list[dict]) -> list[dict]:
        print(f"{name}: {len(settings)} runs, {time.perf_counter() - start:.0f} s so far", flush=True)
        found = run_missing(run, settings, args.runs, args.workers)
        print(f"{name}: {sum(line['CPU seconds of all'] for line in found) / 60:.1f} CPU minutes", flush=True)
        return found

    def keep(table: str, title: str, arms: dict[str, list[dict]], columns: dict[str, int]) -> None:
        if table in wanted:
            print_markdown(f"{table}: {title}", arms, columns)
            figures = {arm: {n: [line.get(n) for line in own] for n in columns} for arm, own in arms.items()}
            summary.setdefault(table, {})[title] = figures

    def pilot(world: str, arms: Sequence[str], seconds: float = 0.0) -> dict[str, dict]:
        """
        The best settings of each rival: first the rate, then the passes, for the decodes; and beside it for the CPU
        seconds, if they are others: few passes are tried with the highest rate and with the best one so far, and then
        the other rates with as many.
        """
        size, tried = args.size("pilot_decodes"), {arm: [] for arm in arms}
        seconds = round(seconds * size / args.size("decodes"), 1)
        budgets = {"decodes": size} | ({"seconds": seconds} if seconds else {})
        rates = RATES[args.quick :]

        def try_out(budget: str | None, name: str, values: Sequence[float], **others) -> None:
            """Vary one setting of what has been best for a budget so far."""
            settings = []
            for arm in arms:
                start = {**RIVALS[arm], "num_iterations": FIRST_PASSES} if budget is None else best(tried[arm], budget)
                varied = [{**start, **others, name: value} for value in values]
                known = [one["config"] for one in tried[arm]]
                settings += [make(world, arm, config, size, seconds) for config in varied if config not in known]
            found = by_arm(make_runs(f"pilot, {world}", of_seeds(settings, PILOT_SEEDS)))
            for arm, lines in found.items():
                for own in by_arm(lines, lambda line: str(line["config"])).values():
                    figures = {n: [at(o["curve"], n, most)["accuracy"] for o in own] for n, most in budgets.items()}
                    tried[arm].append({"config": own[0]["config"], **figures})

        try_out(None, "learning_rate", rates)
        try_out("decodes", "num_iterations", PASSES)
        if seconds:
            for number in FEW_PASSES:  # another rate may be the best with few passes
                try_out("decodes", "num_iterations", (number,), learning_rate=rates[-1])
            try_out("seconds", "num_iterations", FEW_PASSES)
            try_out("seconds", "learning_rate", (*rates, HIGH_RATE))
        summary.setdefault("pilot", {})[world] = tried
        for arm in arms:
            print(f"\n{world}, {arm}", *tried[arm], sep="\n  ")
        chosen = {arm: best(tried[arm], "decodes") for arm in arms}
        others = {arm: best(tried[arm], "seconds") for arm in arms if seconds}
        return chosen | {f"{arm}, for seconds": own for arm, own in others.items() if own != chosen[arm]}

    needs_rivals = wanted & {"table3", "stability", "test_time"}
    curves = {}
    for world in ("told", "thinks") if needs_rivals else ():
        clock = of_seeds([each for each in main_settings(args, make, world, 0.0, {}) if each["arm"] == CLOCK])
        seconds = round(statistics.fmean(line["seconds"] for line in make_runs(f"{world}, clock", clock)), 1)
        rivals = pilot(world, list(RIVALS), seconds)
        if world == "thinks":
            rivals["GRPO, KL"] = {**rivals["GRPO"], "beta": BETA}
        arms = by_arm(make_runs(world, of_seeds(main_settings(args, make, world, seconds, rivals))))
        curves[world] = arms, {"decodes": args.size("decodes"), "seconds": seconds}
        in_dlrs_seconds(arms)
        columns = {"accuracy": 3, AT_18: 3, "at equal seconds": 3, IN_DLRS_SECONDS: 3, "shuffled": 3, "skill": 3}
        columns |= {"skill against the letter": 3, "seconds": 1, "tokens": 0, "parameters": 0, "peak memory": 1}
        budget = f"{world}, {args.size('decodes'):,} decodes or {seconds} CPU seconds"
        keep("table3", budget, arms, columns)
        trained = {arm: own for arm, own in arms.items() if arm != "untrained"}
        for line in itertools.chain(*trained.values()):
            most = args.size("decodes")
            until = [point["accuracy"] for point in line["curve"] if point["decodes"] <= most + 256]
            line[BELOW_BEST] = max(until) - until[-1]
        keep(
            "stability",
            world,
            trained,
            {"reward std": 3, "by drawing questions": 3, "gradient norm cv": 2, BELOW_BEST: 3, "collapsed": 2},
        )
        ks = {"right": 3} | {f"{what}@{2**i}": 3 for what in ("pass", "majority") for i in range(SAMPLES.bit_length())}
        for line in itertools.chain(*arms.values()):
            for name in ("pass@1", "right"):
                line[f"{MOST_FREQUENT} - {name}"] = line[MOST_FREQUENT] - line[name]
        ks |= {f"{MOST_FREQUENT} - {name}": 3 for name in ("pass@1", "right")}
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
        arms = {"DLR, frozen": DLR, "DLR, frozen, hybrid": {**DLR, **HYBRID}}
        arms |= {f"DLR, trainable, {r:g}": {**DLR, **HYBRID, "main_model_rate": r} for r in MAIN_MODEL_RATES}
        found = by_arm(make_runs("table4", of_seeds([make("told", arm, c, short) for arm, c in arms.items()])))
        columns = {"accuracy": 3, "shuffled": 3, "skill": 3, "skill against the letter": 3, "reward std": 3}
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
        weak = {"dot": {"gamma": 0.01}, "infonce": {"gamma": 0.01, "contrastive_similarity": "infonce"}}
        arms |= {f"DLR, parallel, σ fixed, {loss}, γ 0.01": {**DLR, **terms} for loss, terms in weak.items()}
        found = by_arm(
            make_runs("contrastive", of_seeds([make("told", a, c, short, 0.0, 8) for a, c in arms.items()]))
        )
        keep(
            "contrastive",
            "accuracy and diversity",
            found,
            {"accuracy": 3, "pass@1": 3, "shuffled": 3, "diversity": 3, "pass@8": 3},
        )

    if "steps" in wanted:
        arms = {"untrained": {}, **pilot("steps", ["GRPO"]), "DLR": DLR}
        settings = [make("steps", arm, config, args.size("decodes")) for arm, config in arms.items()]
        found = by_arm(make_runs("steps", of_seeds(settings)))
        in_dlrs_seconds(found)
        columns = {
            "right": 3,
            IN_DLRS_SECONDS: 3,
            "seconds": 1,
            "invalid steps": 3,
            "invalid where right": 3,
            "shuffled": 3,
            "skill": 3,
        }
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
        arms, budgets = curves[world]
        xs = [budgets[name] * i / NUM_POINTS for i in range(NUM_POINTS + 1)]
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2])
        for arm, lines in arms.items():
            ys = [statistics.fmean(at(line["curve"], name, x)["accuracy"] for line in lines) for x in xs]
            axis.plot(xs, ys, "o-", ms=2, label=arm)
        axis.set(title=title, ylim=(0, 1), xlabel="CPU seconds" if name == "seconds" else name)
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
            axis.set_xticks(NUM_TOKENS, NUM_TOKENS)
            axis.minorticks_off()
            axis.set(title="normalized variance of the gradient", xlabel="tokens of the answer")
        elif table == "test_time":
            world, arms = list(summary[table].items())[-1]
            axis.set(title=f"pass@k, {world}", xlabel="k")
            for arm, figures in arms.items():
                ks = [name for name in figures if name.startswith("pass")]
                axis.semilogx(
                    [int(n.split("@")[1]) for n in ks], [statistics.fmean(figures[n]) for n in ks], label=arm
                )
            axis.legend(fontsize=6)
        else:
            arms = next(iter(summary[table].values()))
            values = [figures[bars[table]] for figures in arms.values()]
            reaches = [mean - low for mean, low, _ in map(mean_interval, values)]
            axis.barh(list(arms), [statistics.fmean(own) for own in values], xerr=reaches)
            axis.set_xlabel(f"{bars[table]}, {next(iter(summary[table]))}" if table == "stability" else bars[table])
            axis.tick_params(axis="y", labelsize=6)
    for axis in axes[num_panels:]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(PaperTablesArguments).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory(prefix="paper-tables-") as main_models:
        os.environ.setdefault("TRAINED_MODELS", main_models)
        os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        main(arguments)
