# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Plots of a run, each with a sentence that says how to read it."""

import fnmatch
import importlib.util
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..evaluation.preflight import MIN_MIXED_GROUPS


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Draw = Callable[[Axes], None]


COLOURS = ["#2563eb", "#d97706", "#059669", "#be185d", "#6d28d9", "#475569"]
CONTROL_COLOURS = {  # in the order in which they are read
    "no_latents": "#64748b",
    "before_training": "#d97706",
    "policy": "#059669",
    "mean_latents": "#2563eb",
    "shuffled": "#be185d",
}
MARKERS = "os^DvP*X<>"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
NARROW, WIDE, DPI = 5.6, 11.2, 130  # inches
CONTROL_FIGURES = ("accuracy", "format", "pass_at_k")
ROLLOUT_TIMES = ("time/sample", "time/decode", "time/reward", "time/prescreen")


def check_matplotlib() -> None:
    """Raise an `ImportError` that says what to install if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('The report draws with matplotlib, which is not installed: pip install "trl_dlr[report]"')


@dataclass(frozen=True)
class Panel:
    """
    Metrics over steps on one pair of axes.

    Args:
        title (`str`):
            What they are.
        metrics (`tuple[str, ...]`):
            Their names, with `*` for any part. What evaluation during training logs of them is drawn as points.
        mark (`float`, *optional*):
            Value at which a line says where to begin to worry.
        control (`str`, *optional*):
            Held-out metric of which each control is a line.
        is_share (`bool`, *optional*, defaults to `False`):
            Whether the axis goes from 0 to 1.
    """

    title: str
    metrics: tuple[str, ...]
    mark: float | None = None
    control: str | None = None
    is_share: bool = False


@dataclass(frozen=True)
class Plot:
    """
    Panels that are read together.

    Args:
        name (`str`):
            Name of the PNG file.
        title (`str`):
            Heading.
        reading (`str`):
            How to read it, and what is a warning sign.
        panels (`tuple[Panel, ...]`, *optional*):
            Metrics over steps. What is drawn otherwise has none.
    """

    name: str
    title: str
    reading: str
    panels: tuple[Panel, ...] = ()


REWARDS = Plot(
    "rewards",
    "Rewards",
    "Rewards of sampled answers should rise towards and past the dashed lines of held-out controls (with the first "
    "reward's weight as 1). Warning signs: a flat total, one part that rises while another falls, and, with "
    "pre-screening, reading `reward`, which choosing the best biases upward, instead of `reward_random`.",
    (
        Panel("Total", ("reward", "prescreening/reward_random"), control="reward"),
        Panel("Parts", ("rewards/*/mean",)),
    ),
)
CONTROLS = Plot(
    "controls",
    "Held-out controls",
    "What latents add is `policy` beside `no_latents` and `before_training`; what they carry about their own "
    "question is `policy` beside `shuffled`. Warning sign: bars of `shuffled` as high as those of `policy`, which is "
    "steering, not reasoning.",
)
GROUPS = Plot(
    "groups",
    "Groups with mixed rewards",
    "Only groups whose answers differ in reward teach anything. Warning sign: a share below the dotted line for long; "
    "near the end it may mean that most questions are solved.",
    (Panel("Share of groups", ("frac_reward_mixed",), mark=MIN_MIXED_GROUPS, is_share=True),),
)
RATIO = Plot(
    "ratio",
    "Size of an update",
    "How far an update moves the density of the latents. Clip fractions of 0.1 to 0.7 are normal when a rollout is "
    "passed over several times. Warning signs: clip fractions that stay at 0 (it hardly learns) or near 1, and a "
    "spread that keeps growing.",
    (
        Panel("Spread of log-ratios", ("latent/log_ratio_std",)),
        Panel(
            "Share of clipped latents",
            ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"),
            is_share=True,
        ),
    ),
)
SIZE = Plot(
    "mean_and_sigma",
    "Size of the means and of the noise",
    "Means grow as the policy decides, σ is the noise around them. Warning signs: means far above σ, where samples "
    "of a question hardly differ and exploration ends, and a learned σ that goes to 0 or grows without end.",
    (
        Panel("‖μ‖, or the RMS of μ/σ", ("latent/mean_norm", "latent/mean_size")),
        Panel("σ", ("latent/sigma",)),
    ),
)
DIVERSITY = Plot(
    "diversity",
    "Diversity of a group",
    "1 minus the mean cosine of a group's trajectories: 1 where they point anywhere, 0 where they are alike. Warning "
    "sign: a fall to 0 while rewards have not risen.",
    (Panel("1 − mean cosine", ("latent/diversity",)),),
)
LENGTH = Plot(
    "length",
    "Latent steps",
    "Steps that trajectories took before a learned stop. Warning sign: a mean that falls together with the rewards, "
    "for which a smaller `latent_cost` is the remedy.",
    (Panel("Steps of a trajectory", ("latent/mean_length", "latent/min_length", "latent/max_length")),),
)
SCREENING = Plot(
    "screening",
    "Pre-screening",
    "AUC says how well the value head ranks trajectories before they are decoded: 0.5 is chance, and `auc_random` is "
    "the honest one, on trajectories that it did not choose. Warning sign: an AUC around the dotted line after the "
    "warm-up, where the decoded fraction falls and the choice is no better than a random one.",
    (
        Panel(
            "AUC of the value head", ("prescreening/auc_random", "prescreening/auc_selected"), mark=0.5, is_share=True
        ),
        Panel("Share of trajectories decoded", ("main_model/decoded_fraction",), is_share=True),
    ),
)
OPTIMIZATION = Plot(
    "optimization",
    "Optimization",
    "The loss of reinforcement learning hovers around 0 and says little; a supervised one should fall, on held-out "
    "questions too. Warning signs: spikes of the gradient's norm that do not come back, and any skipped step (no "
    "reward at all, or a loss that is not finite).",
    (
        Panel("Loss", ("loss",)),
        Panel("Norm of the gradient", ("grad_norm",)),
        Panel("Share of skipped steps", ("skipped_steps",), is_share=True),
    ),
)
TERMS = Plot(
    "terms",
    "Further terms of the loss",
    "Before their weights (`beta`, `gamma`, `hybrid_coef`). Warning signs: a KL that keeps growing, for which a "
    "larger `beta` is the brake, and a contrastive term that is 0 from the start and so does nothing.",
    (
        Panel("KL to the reference", ("latent/kl",)),
        Panel("Contrastive", ("latent/contrastive",)),
        Panel("Hybrid", ("latent/hybrid",)),
    ),
)
ACCURACY = Plot(
    "accuracy",
    "Accuracy of supervised training",
    "Of gold tokens, and of held-out answers decoded from sampled latents, which is what counts. Warning sign: tokens "
    "that get better while decoded answers do not.",
    (Panel("Accuracy", ("mean_token_accuracy", "eval_accuracy", "eval_pass_at_k"), is_share=True),),
)
TIME = Plot(
    "time",
    "Time of a step",
    "Seconds of an optimizer step in the main process; what is done once per rollout is spread over its steps, and "
    "`optimize` has the hybrid term in it. Warning sign: decoding that dwarfs the rest, which more passes over a "
    "rollout (`num_iterations`), pre-screening or vLLM make cheaper.",
)
MAP = Plot(
    "latent_map",
    "Map of latents",
    "A point is a sampled trajectory on the two main axes of its moment, so places of the two maps cannot be "
    "compared. Shapes are questions; colour is the reward. Apart by shape: latents depend on the question. Apart by "
    "colour: reward can be told from the latents, which is what pre-screening needs. Warning sign: after training, "
    "one cloud of all shapes, as if there were no question.",
)
PLOTS = (
    REWARDS,
    CONTROLS,
    GROUPS,
    RATIO,
    SIZE,
    DIVERSITY,
    LENGTH,
    SCREENING,
    OPTIMIZATION,
    TERMS,
    ACCURACY,
    TIME,
    MAP,
)


# ---- What a log history holds ----


def series_of(log_history: list[dict[str, Any]], metric: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of a metric."""
    pairs = [
        (entry["step"], entry[metric])
        for entry in log_history
        if isinstance(entry.get(metric), (int, float)) and math.isfinite(entry[metric])
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def logged_metrics(log_history: list[dict[str, Any]], patterns: Iterable[str]) -> list[str]:
    """Metrics with at least one finite value that match one of `patterns`, and what evaluation logs of them."""
    names = list(dict.fromkeys(name for entry in log_history for name in entry))
    wanted = [wide for pattern in patterns for wide in (pattern, f"eval_{pattern}")]
    matching = [name for pattern in wanted for name in names if fnmatch.fnmatchcase(name, pattern)]
    return [name for name in dict.fromkeys(matching) if series_of(log_history, name)[0]]


# ---- Drawing ----


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would set it as a formula


def _lines(
    panel: Panel, metrics: list[str], log_history: list[dict[str, Any]], controls: dict[str, dict[str, float]]
) -> "Draw":
    def draw(axes: "Axes") -> None:
        for index, metric in enumerate(metrics):
            steps, values = series_of(log_history, metric)
            is_evaluation = metric.startswith("eval_")
            style = {"marker": "D", "linestyle": "--"} if is_evaluation else {"linewidth": 1.6}
            if len(steps) == 1:
                style["marker"] = "o"
            axes.plot(steps, values, color=COLOURS[index % len(COLOURS)], label=_plain(metric), markersize=4, **style)
        for name, held_out in controls.items():
            if panel.control in held_out:
                label, colour = f"held out: {_plain(name)}", CONTROL_COLOURS.get(name, "#475569")
                axes.axhline(held_out[panel.control], color=colour, linestyle="--", linewidth=1, label=label)
        if panel.mark is not None:
            axes.axhline(panel.mark, color="#b91c1c", linestyle=":", linewidth=1.2)
        axes.set_xlabel("step")
        axes.margins(y=0.12)
        if panel.is_share:
            axes.set_ylim(-0.04, 1.04)

    return draw


def _bars(metric: str, controls: dict[str, dict[str, float]]) -> "Draw":
    def draw(axes: "Axes") -> None:
        named = {name: metrics[metric] for name, metrics in controls.items() if metric in metrics}
        for index, (name, value) in enumerate(named.items()):
            colour = CONTROL_COLOURS.get(name, "#475569")
            bar = axes.barh([index], [value], color=colour, height=0.62, label=_plain(name))
            axes.bar_label(bar, fmt="%.2f", padding=3, fontsize=8)
        axes.set_yticks([])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.grid(axis="y", visible=False)

    return draw


def _times(metrics: list[str], log_history: list[dict[str, Any]], steps_per_rollout: float) -> "Draw":
    def draw(axes: "Axes") -> None:
        seconds = {}
        for metric in metrics:
            values = series_of(log_history, metric)[1]
            mean = sum(values) / len(values)
            seconds[metric] = mean / steps_per_rollout if metric in ROLLOUT_TIMES else mean
        total = max(sum(seconds.values()), 1e-9)
        left = 0.0
        for index, (metric, value) in enumerate(seconds.items()):
            label = f"{metric.removeprefix('time/')}: {value:.3g} s, {value / total:.0%}"
            axes.barh([0], [value], left=left, color=COLOURS[index % len(COLOURS)], label=label, height=0.5)
            left += value
        axes.set_yticks([])
        axes.set_ylim(-0.6, 0.6)
        axes.set_xlabel("seconds per optimizer step, mean over the run")

    return draw


def _time_lines(metrics: list[str], log_history: list[dict[str, Any]], steps_per_rollout: float) -> "Draw":
    def draw(axes: "Axes") -> None:
        for index, metric in enumerate(metrics):
            steps, values = series_of(log_history, metric)
            share = steps_per_rollout if metric in ROLLOUT_TIMES else 1
            axes.plot(
                steps,
                [value / share for value in values],
                color=COLOURS[index % len(COLOURS)],
                linewidth=1.6,
                marker="o" if len(steps) == 1 else None,
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")

    return draw


def _map(probe: dict[str, Any], limits: tuple[float, float]) -> "Draw":
    def draw(axes: "Axes") -> None:
        low, high = limits
        points = None
        for index, question in enumerate(probe["questions"]):
            samples, marker = question["samples"], MARKERS[index % len(MARKERS)]
            judged = [sample for sample in samples if sample["reward"] is not None]
            others = [sample for sample in samples if sample["reward"] is None]
            axes.scatter([s["x"] for s in others], [s["y"] for s in others], c="#d1d5db", marker=marker, s=26)
            points = axes.scatter(
                [s["x"] for s in judged],
                [s["y"] for s in judged],
                c=[s["reward"] for s in judged],
                vmin=low,
                vmax=high,
                cmap="viridis",
                marker=marker,
                s=30,
                linewidths=0.4,
                edgecolors="#1f2937",
            )
            axes.scatter([], [], c="none", edgecolors="#1f2937", marker=marker, label=f"question {index + 1}")
        axes.figure.colorbar(points, cax=axes.inset_axes([1.03, 0.1, 0.03, 0.8]), label="reward")
        x, y = probe["variance_shares"]
        axes.set_xlabel(f"axis 1 ({x:.0%} of the variance)")
        axes.set_ylabel(f"axis 2 ({y:.0%})")

    return draw


def _as_png(panels: list[tuple[str, "Draw"]], height: float, right: float) -> bytes:
    # No pyplot: it would take over the backend of the process that trains. Margins are fixed, in inches: to fit them
    # takes longer than all the rest.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure()
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        num_rows = 0
        for axes, (title, draw) in zip(grid, panels, strict=True):
            axes.set_title(title, loc="left")
            draw(axes)
            num_labels = len(axes.get_legend_handles_labels()[1])
            if num_labels > 0:
                axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.46 / height), ncols=2, borderaxespad=0)
                num_rows = max(num_rows, math.ceil(num_labels / 2))
        width = NARROW if len(panels) == 1 else WIDE
        above, below, left = 0.35, 0.5 + 0.19 * num_rows, 0.65
        whole, each = above + height + below, width / len(panels) - left - right
        figure.set_size_inches(width, whole)
        edges = left / width, below / whole, 1 - right / width, 1 - above / whole
        figure.subplots_adjust(*edges, wspace=(left + right) / each)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def draw_plots(
    log_history: list[dict[str, Any]],
    controls: dict[str, dict[str, float]],
    probes: dict[str, dict[str, Any]],
    steps_per_rollout: float = 1.0,
) -> tuple[dict[str, bytes], list[str]]:
    """
    Draw what the data allow of all plots.

    Args:
        log_history (`list[dict[str, Any]]`):
            What was logged, as in `trainer_state.json`: a `step` and metrics in each entry.
        controls (`dict[str, dict[str, float]]`):
            Held-out metrics of each control.
        probes (`dict[str, dict[str, Any]]`):
            Results of [`take_probe`] by their titles.
        steps_per_rollout (`float`, *optional*, defaults to `1.0`):
            Optimizer steps that one rollout serves.

    Returns:
        `tuple[dict[str, bytes], list[str]]`: PNG files by the names of their plots, and what could not be drawn.
    """
    check_matplotlib()
    files, missing = {}, []
    for plot in PLOTS:
        drawn, height, right = [], 2.4, 0.15
        for panel in plot.panels:
            metrics = logged_metrics(log_history, panel.metrics)
            if metrics:
                drawn.append((panel.title, _lines(panel, metrics, log_history, controls)))
            else:
                missing.append(f"{plot.title}: {panel.title} ({', '.join(panel.metrics)})")
        if plot is SCREENING and len(drawn) < len(plot.panels):  # without a value head, all are decoded
            drawn = []
        elif plot is CONTROLS:
            metrics = [name for name in CONTROL_FIGURES if any(name in found for found in controls.values())]
            drawn = [(name, _bars(name, controls)) for name in metrics]
            height = 0.3 + 0.27 * len(controls)
        elif plot is TIME:
            metrics = logged_metrics(log_history, (*ROLLOUT_TIMES, "time/optimize"))
            metrics = [metric for metric in metrics if not metric.startswith("eval_")]
            if metrics:
                logged = metrics, log_history, steps_per_rollout
                drawn = [("Where it goes", _times(*logged)), ("Over steps", _time_lines(*logged))]
        elif plot is MAP:
            rewards = [s["reward"] for probe in probes.values() for q in probe["questions"] for s in q["samples"]]
            rewards = [reward for reward in rewards if reward is not None] or [0.0]
            drawn = [(title, _map(probe, (min(rewards), max(rewards)))) for title, probe in probes.items()]
            height, right = 3.6, 0.95
        if not plot.panels and not drawn:
            missing.append(plot.title)
        if drawn:
            files[plot.name] = _as_png(drawn, height, right)
    return files, missing
