# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The page of a run: one HTML file that opens without a network."""

import base64
import json
import os
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from .plots import CONTROL_COLOURS, DPI, NARROW, PLOTS, check_matplotlib, draw_plots, logged_metrics, series_of


REPORT_DIR = "report"
RUN_FILE = "run.json"
RESULTS_FILE = "eval_results.json"  # in the run's folder, as Trainer names it
PROBE_FILES = {"before": "probe_before.json", "after": "probe_after.json"}
FIGURES = ("reward", "accuracy", "format", "pass_at_k", "mixed", "loss")  # of a control, in this order
MAX_KINDS = 5  # different completions of a question that are shown

STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --page: #f8fafc; --card: #fff;
  --good: #047857; --bad: #b91c1c; --chip: #eef2ff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --page: #0f172a;
  --card: #1e293b; --good: #34d399; --bad: #f87171; --chip: #312e81; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 10px; } h3 { font-size: 15px; margin: 0; }
p { margin: 4px 0 12px; } .soft, figcaption { color: var(--soft); font-size: 13px; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px;
  grid-auto-flow: dense; align-items: start; } .wide { grid-column: 1 / -1; }
@media (max-width: 800px) { .grid { grid-template-columns: minmax(0, 1fr); } }
figure, .card { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; }
.card { overflow-x: auto; }
figure img { width: 100%; margin: 8px 0; border-radius: 6px; background: #fff; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font: 12.5px/1.6 ui-monospace, monospace; background: var(--chip); border-radius: 4px; padding: 1px 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 10px 0; } summary { cursor: pointer; }
.prompt { white-space: pre-wrap; max-height: 9em; overflow: auto; margin: 2px 0 8px; }
.good { color: var(--good); } .bad { color: var(--bad); } .nowrap { white-space: nowrap; }
"""


# ---- Parts of the page: text in, escaped HTML out ----


def _table(header: list[str], rows: list[list[str]], numbers_from: int = 1) -> str:
    """Cells are HTML already; those from column `numbers_from` on are numbers."""

    def line(cells: list[str], tag: str) -> str:
        kinds = [' class="number"' if index >= numbers_from else "" for index in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{c}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _prose(text: str) -> str:
    """Text with `names` in it."""
    parts = [escape(part) for part in text.split("`")]
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _code(text: str) -> str:
    """Text whose blanks can be seen."""
    visible = text.replace("\n", "↵\n") if text.strip() else text.replace(" ", "␣").replace("\n", "↵")
    return f"<code>{escape(visible) or '∅'}</code>"


def _token(text: str) -> str:
    return f"<code>{escape(text.replace(' ', '␣').replace(chr(10), '↵')) or '∅'}</code>"


def by_control(results: dict[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Metrics of each control, from `<control>/<metric>` keys, and what else there is."""
    controls, others = {}, {}
    for key, value in results.items():
        control, _, metric = key.rpartition("/")
        metric = metric.removeprefix("eval_")
        if isinstance(value, (int, float)) and control and metric in FIGURES:
            controls.setdefault(control, {})[metric] = value
        elif isinstance(value, (int, float)):
            others[key] = value
    order = dict.fromkeys([*CONTROL_COLOURS, *controls])  # files of metrics are sorted by name
    return {control: controls[control] for control in order if control in controls}, others


def _summary(run_summary: dict[str, Any], log_history: list[dict[str, Any]]) -> str:
    rows = [[escape(name), escape(str(value))] for name, value in run_summary.items()]
    runtimes = series_of(log_history, "train_runtime")[1]
    if runtimes:
        rows.append(["Time of training", f"{runtimes[-1]:.0f} s, with the report's, since its last start"])
    metrics = logged_metrics(log_history, [name for plot in PLOTS for panel in plot.panels for name in panel.metrics])
    found = []
    for metric in metrics:
        steps, values = series_of(log_history, metric)
        found.append([_token(metric), _number(values[0]), _number(values[-1]), str(steps[-1])])
    parts = [f'<div class="card"><h3>Run</h3>{_table(["", ""], rows, numbers_from=2)}</div>']
    if found:
        table = _table(["metric", "first", "last", "at step"], found)
        parts.append(f'<div class="card"><h3>Figures of training</h3>{table}</div>')
    return f'<h2>Summary</h2><div class="grid">{"".join(parts)}</div>'


def _held_out(results: dict[str, Any] | None) -> str:
    if not results:
        return ""
    controls, others = by_control(results)
    html = ["<h2>Held out</h2>"]
    if controls:
        columns = [metric for metric in FIGURES if any(metric in found for found in controls.values())]
        rows = [[escape(name), *(_number(of.get(metric)) for metric in columns)] for name, of in controls.items()]
        text = ""
        if "accuracy" in controls.get("policy", {}) and "accuracy" in controls.get("shuffled", {}):
            kept = controls["policy"]["accuracy"] - controls["shuffled"]["accuracy"]
            text = (
                f'<p class="soft">Accuracy of trained latents is {kept:+.3f} beside latents of <em>another</em> '
                "question. What shuffling does not cost is steering; only what it costs is about the question.</p>"
            )
        html.append(f'<div class="card">{_table(["", *columns], rows)}{text}</div>')
    if others:
        rows = [[_token(key), _number(value)] for key, value in others.items()]
        html.append(f"<details><summary>Other metrics</summary>{_table(['', ''], rows)}</details>")
    return "".join(html)


def _plots(files: dict[str, bytes]) -> str:
    figures = []
    for plot in PLOTS:
        if plot.name in files:
            content = base64.b64encode(files[plot.name]).decode()
            is_wide = int.from_bytes(files[plot.name][16:20], "big") > NARROW * DPI  # a PNG file's width
            figures.append(
                f'<figure id="{plot.name}"{" class=wide" if is_wide else ""}><h3>{escape(plot.title)}</h3>'
                f'<img alt="{escape(plot.title)}" src="data:image/png;base64,{content}">'
                f"<figcaption>{_prose(plot.reading)}</figcaption></figure>"
            )
    return f'<h2>Plots</h2><div class="grid">{"".join(figures)}</div>' if figures else ""


def _words(probes: dict[str, dict[str, Any]]) -> str:
    """Nearest tokens, a table for each question, a row for each latent."""
    if not probes:
        return ""
    first = next(iter(probes.values()))["questions"]
    kinds = {"tokens": "embedding", "offset_tokens": "offset from the anchor"}
    columns = [(kind, title) for kind in kinds if kind in first[0] for title in probes]
    blocks = []
    for index, question in enumerate(first):
        rows = []
        of_columns = [probes[title]["questions"][index][kind] for kind, title in columns]
        for step in range(max(map(len, of_columns))):  # a learned stop may come earlier than it did
            cells = [f'<span class="nowrap">latent {step + 1}</span>']
            for steps in of_columns:
                tokens = steps[step] if step < len(steps) else []
                cells.append(
                    " ".join(f'{_token(t["text"])}<span class="soft"> {t["cosine"]:.2f}</span>' for t in tokens)
                )
            rows.append(cells)
        header = ["", *(f"{kinds[kind]}, {escape(title)}" for kind, title in columns)]
        blocks.append(
            f"<details{' open' if index == 0 else ''}><summary>Question {index + 1}: {escape(question['prompt'][:90])}"
            f'</summary><div class="card">{_table(header, rows, numbers_from=len(header))}</div></details>'
        )
    return (
        "<h2>What the latents say</h2><p class='soft'>Tokens of the main model whose input embeddings have the "
        "largest cosine with the embedding of each <em>mean</em> latent (what is sampled lies around it). An "
        "anchored embedding is near its anchor unless the latent is large; its offset from there says where the "
        "latent pushes. Cosines near 0 "
        "mean that no token is near: the latent is not a word.</p>" + "".join(blocks)
    )


def _judged(sample: dict[str, Any], count: int | None = None) -> str:
    reward = sample["reward"]
    kind = "soft" if reward is None else "good" if reward > 0 else "bad"
    times = f'<span class="soft">{count} × </span>' if count else ""
    value = "no reward" if reward is None else f"{reward:+.3g}"
    return f'<p>{times}{_code(sample["completion"])} <span class="{kind} nowrap">{value}</span></p>'


def _completions(probes: dict[str, dict[str, Any]]) -> str:
    if not probes:
        return ""
    titles = list(probes)
    blocks = []
    for index, question in enumerate(probes[titles[-1]]["questions"]):
        cells = [_judged(question["alone"])]
        for title in titles:
            samples = probes[title]["questions"][index]["samples"]
            kinds = Counter((sample["completion"], sample["reward"]) for sample in samples).most_common()
            shown = [_judged({"completion": text, "reward": reward}, n) for (text, reward), n in kinds[:MAX_KINDS]]
            if len(kinds) > MAX_KINDS:
                shown.append(f'<p class="soft">and {len(kinds) - MAX_KINDS} other completions</p>')
            cells.append("".join(shown))
        gold = f'<p class="soft prompt">Expected: {escape(question["answer"])}</p>' if "answer" in question else ""
        header = ["main model alone", *(f"with latents, {escape(title)}" for title in titles)]
        blocks.append(
            f'<div class="card"><h3>Question {index + 1}</h3><p class="prompt">{escape(question["prompt"])}</p>{gold}'
            f"{_table(header, [cells], numbers_from=len(header))}</div><br>"
        )
    return (
        "<h2>Completions</h2><p class='soft'>What the main model writes alone, and after sampled latents: how often, "
        "what, and its reward. Warning sign: the same answer to every question.</p>" + "".join(blocks)
    )


# ---- The page ----


def _prompts(probe: dict[str, Any]) -> list[str]:
    return [question["prompt"] for question in probe["questions"]]


def render_report(
    log_history: list[dict[str, Any]],
    results: dict[str, Any] | None = None,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
    run_summary: dict[str, Any] | None = None,
    steps_per_rollout: float = 1.0,
    title: str = "Training report",
) -> tuple[str, dict[str, bytes]]:
    """
    The page of a run and its plots. What is not there is left out, and named at the end.

    Args:
        log_history (`list[dict[str, Any]]`):
            What was logged, as in `trainer_state.json`.
        results (`dict[str, Any]`, *optional*):
            Held-out metrics under `<control>/<figure>`, as in `eval_results.json`.
        before (`dict[str, Any]`, *optional*):
            Result of [`take_probe`] before training, with the `step` at which it was taken.
        after (`dict[str, Any]`, *optional*):
            The same after training, or during it, on the same questions.
        run_summary (`dict[str, Any]`, *optional*):
            What else to say of the run at the top.
        steps_per_rollout (`float`, *optional*, defaults to `1.0`):
            Optimizer steps that one rollout serves.
        title (`str`, *optional*, defaults to `"Training report"`):
            Heading.

    Returns:
        `tuple[str, dict[str, bytes]]`: HTML with all images in it, and PNG files by the names of their plots.
    """
    if not isinstance(log_history, list) or not all(isinstance(e, dict) and "step" in e for e in log_history):
        raise ValueError(
            "`log_history` must be a list of dicts with a 'step', as in `trainer_state.json`, got "
            f"{str(log_history)[:80]!r}."
        )
    if before and after and _prompts(before) != _prompts(after):  # a resumed run may have been given others
        before = None
    probes = {f"step {probe['step']}": probe for probe in (before, after) if probe is not None}
    files, missing = draw_plots(log_history, by_control(results or {})[0], probes, steps_per_rollout)
    if not results:
        missing.append("Held-out table")
    if before is None:
        missing.append("Map, nearest tokens and completions before training, on the same questions")
    if after is None:
        missing.append("Map, nearest tokens and completions after training")
    parts = [
        f"<h1>{escape(title)}</h1>",
        _summary(run_summary or {}, log_history),
        _held_out(results),
        _plots(files),
        _completions(probes),
        _words(probes),
    ]
    if missing:
        items = "".join(f"<li>{escape(item)}</li>" for item in missing)
        parts.append(f'<h2>Not logged in this run</h2><ul class="soft" id="missing">{items}</ul>')
    html = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
    return html, files


def write_whole(path: Path, content: bytes) -> None:
    """A file that is whole or not there, whenever the process is killed."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_report(output_dir: str, with_eval_results: bool = True) -> Path:
    """
    Write `<output_dir>/report/report.html`, and the plots as PNG files beside it, from what [`LatentReportCallback`]
    keeps there and, if it exists, `<output_dir>/eval_results.json`.

    Args:
        output_dir (`str`):
            Folder of the run.
        with_eval_results (`bool`, *optional*, defaults to `True`):
            Whether to read `eval_results.json`. While a run goes on it is that of an earlier one.

    Returns:
        `Path`: the page.
    """
    check_matplotlib()
    folder = Path(output_dir) / REPORT_DIR
    run = _read(folder / RUN_FILE)
    if run is None:
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` has no {REPORT_DIR}/{RUN_FILE}. Train with a `LatentReportCallback`, "
            "or give `render_report` a log history."
        )
    results = _read(Path(output_dir) / RESULTS_FILE) if with_eval_results else None
    probes = {name: _read(folder / file) for name, file in PROBE_FILES.items()}
    html, files = render_report(results=results, **probes, **run)
    for plot in PLOTS:
        path = folder / f"{plot.name}.png"
        if plot.name in files:
            write_whole(path, files[plot.name])
        else:
            path.unlink(missing_ok=True)  # of an earlier run in this folder
    write_whole(folder / "report.html", html.encode())
    return folder / "report.html"
