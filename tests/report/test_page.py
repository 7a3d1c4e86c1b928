# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import base64
import importlib.util
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tests.tiny import tiny_dataset, tiny_reward, trained_main_model
from tests.trainer.test_latent_grpo_trainer import make_trainer
from tests.trainer.test_latent_sft_trainer import make_sft_trainer
from trl_dlr import LatentReportCallback
from trl_dlr.report import render_report, write_report
from trl_dlr.report.page import by_control
from trl_dlr.report.plots import PLOTS, REWARDS, _lines, _times, logged_metrics, series_of


matplotlib = pytest.importorskip("matplotlib")
CONTROLS = {"no_latents": -0.8, "before_training": -0.5, "policy": 0.3, "shuffled": 0.1}
RESULTS = {f"{name}/reward": value for name, value in CONTROLS.items()}
RESULTS |= {f"{name}/accuracy": (value + 1) / 2 for name, value in CONTROLS.items()}
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """What a browser would make of a page: its tags, its text, and whether every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self._open = [], [], []
        self.feed(html)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def missing_of(html):
    return html.partition('id="missing"')[2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run in which everything is logged, and its held-out figures."""
    folder = tmp_path_factory.mktemp("report")
    trainer = make_trainer(
        folder,
        reward_funcs=tiny_reward,
        main_model=trained_main_model(),
        policy_kwargs={"learn_sigma": True, "num_latents": 2, "learn_stop": True},
        max_steps=12,
        num_generations=8,
        per_device_train_batch_size=32,
        prescreening_fraction=0.5,
        prescreening_warmup_rollouts=1,
        beta=0.01,
        gamma=0.1,
        hybrid_coef=0.1,
    )
    questions = tiny_dataset(3, 1, held_out=True)
    trainer.add_callback(LatentReportCallback(trainer, questions, tiny_reward, num_samples=4))
    trainer.train()
    (folder / "run" / "eval_results.json").write_text(json.dumps(RESULTS))
    page = write_report(folder / "run")
    assert page == folder / "run" / "report" / "report.html"
    return folder / "run"


def test_every_plot_is_there_as_a_file_and_in_the_page(run_dir):
    html = (run_dir / "report" / "report.html").read_text()
    inlined = {base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([^\"]+)", html)}
    names = {path.stem for path in (run_dir / "report").glob("*.png")}
    assert names == {plot.name for plot in PLOTS} - {"accuracy"}  # which is of supervised training
    for name in names:
        content = (run_dir / "report" / f"{name}.png").read_bytes()
        assert content in inlined
        pixels = matplotlib.image.imread(io.BytesIO(content), format="png")
        assert pixels.shape[0] > 100 and pixels.shape[1] > 500 and pixels.std() > 0.01
    assert len(inlined) == len(names)
    for plot in PLOTS:
        assert len(plot.reading) > 60 and "Warning sign" in plot.reading
    text = " ".join(Page(html).text.split())
    assert "Not logged in this run" in text
    assert re.findall(r"<li>(.*?)</li>", missing_of(html)) == [
        "Accuracy of supervised training: Accuracy (mean_token_accuracy, eval_accuracy, eval_pass_at_k)"
    ]


def test_the_page_asks_the_network_for_nothing(run_dir):
    html = (run_dir / "report" / "report.html").read_text()
    page = Page(html)
    fetched = [value for tag, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert fetched and all(value.startswith("data:") for value in fetched)
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "url(" not in html and "@import" not in html


def test_the_tables_have_the_figures_of_the_run(run_dir):
    html = (run_dir / "report" / "report.html").read_text()
    run = json.loads((run_dir / "report" / "run.json").read_text())
    for metric in ("reward", "latent/sigma", "prescreening/reward_random", "main_model/decoded_fraction"):
        steps, values = series_of(run["log_history"], metric)
        row = re.search(rf"<code>{metric}</code></td>(.*?)</tr>", html)[1]
        assert re.findall(r">([^<]+)</td>", row) == [f"{values[0]:.4g}", f"{values[-1]:.4g}", str(steps[-1])]
    for name, reward in CONTROLS.items():
        cells = re.findall(r">([^<]+)</td>", re.search(rf"<tr><td>{name}</td>(.*?)</tr>", html)[1])
        assert [float(cell) for cell in cells] == pytest.approx([reward, (reward + 1) / 2])
    assert "12 of 12" in html and "+0.100 beside latents of" in html
    before, after = (
        json.loads((run_dir / "report" / f"probe_{when}.json").read_text()) for when in ("before", "after")
    )
    assert (before["step"], after["step"]) == (0, 12)
    assert "with latents, step 0" in html and "with latents, step 12" in html
    for question in before["questions"]:
        assert f'<p class="prompt">{question["prompt"]}</p>' in html
        assert "offset_tokens" not in question  # this run has components, not anchors


# ---- What is drawn ----


def axes_of(draw):
    axes = matplotlib.figure.Figure().subplots()
    draw(axes)
    return axes


def test_rewards_have_the_controls_as_lines():
    history = [{"step": 1, "reward": -1.0}, {"step": 2, "reward": float("nan")}, {"step": 3, "reward": 1.0}]
    axes = axes_of(_lines(REWARDS.panels[0], ["reward"], history, by_control(RESULTS)[0]))
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["reward"].get_xdata().tolist() == [1, 3] and lines["reward"].get_ydata().tolist() == [-1, 1]
    for name, reward in CONTROLS.items():
        assert list(lines[f"held out: {name}"].get_ydata()) == [reward, reward]


def test_the_time_of_a_rollout_is_spread_over_its_steps():
    history = [{"step": 4, "time/decode": 2.0, "time/optimize": 1.0}, {"step": 8, "time/decode": 4.0}]
    axes = axes_of(_times(["time/decode", "time/optimize"], history, 4))
    assert [bar.get_width() for bar in axes.patches] == [0.75, 1.0]
    assert axes.get_legend_handles_labels()[1] == ["decode: 0.75 s, 43%", "optimize: 1 s, 57%"]


def test_metrics_are_found_by_name_and_what_has_no_value_is_not_logged():
    history = [
        {"step": 1, "rewards/a/mean": 0.1, "rewards/a/std": 1.0, "reward": None, "loss": float("inf")},
        {"step": 2, "rewards/b/mean": 0.2, "eval_reward": 0.3, "reward": float("nan")},
    ]
    assert logged_metrics(history, ["rewards/*/mean"]) == ["rewards/a/mean", "rewards/b/mean"]
    assert logged_metrics(history, ["reward", "loss"]) == ["eval_reward"]


# ---- What is missing, and what is strange ----


def test_what_was_not_logged_is_named_and_left_out():
    decoded = {"main_model/decoded_fraction": 1.0}  # which says nothing where there is no value head
    html, files = render_report([{"step": 1, "loss": 1.0, **decoded}, {"step": 2, "loss": 0.5, **decoded}])
    assert list(files) == ["optimization"]
    missing = missing_of(html)
    for plot in PLOTS:
        assert plot.name == "optimization" or f"<li>{plot.title}" in missing
    for name in ("latent/diversity", "clip_ratio/region_mean", "prescreening/auc_random", "grad_norm"):
        assert name in missing
    assert "Held-out table" in missing and "completions before training" in missing
    assert "Optimization: Loss" not in missing
    Page(html)


def test_an_empty_history_gives_a_page_that_says_so():
    html, files = render_report([])
    assert files == {}
    assert len(re.findall("<li>", missing_of(html))) >= len(PLOTS)
    Page(html)


def make_probe(text, reward=1.0, num_steps=2):
    token = {"id": 1, "text": text, "cosine": 0.5}
    samples = [{"completion": text, "reward": reward, "x": float(i), "y": -1.0} for i in range(3)]
    question = {"prompt": text, "answer": text, "alone": samples[0], "samples": samples}
    question |= {"tokens": [[token]] * num_steps, "offset_tokens": [[token]] * num_steps}
    return {"step": 0, "variance_shares": [0.6, 0.4], "questions": [question]}


def test_markup_is_shown_as_text():
    evil = '</code><script>alert(1)</script><img src="http://evil.test/x" onerror=alert(2)> & $x_$'
    html, files = render_report(
        [{"step": 1, f"rewards/{evil}/mean": 1.0}],
        {f"{evil}/reward": 0.5, f"{evil}/other": 1.0},
        make_probe(evil),
        {**make_probe(evil), "step": 5},
        {evil: evil},
        title=evil,
    )
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= {
        *"html head meta link title style body main h1 h2 h3 div table thead tbody tr th td p em code span".split(),
        *"figure img figcaption details summary br ul li".split(),
    }
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all(attrs["src"].startswith("data:") for tag, attrs in page.tags if tag == "img")
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert {"rewards", "latent_map"} <= set(files)


@pytest.mark.parametrize("reward", [None, 0.0])
def test_rewards_that_are_all_alike_or_missing_can_be_drawn(reward):
    html, files = render_report([], before=make_probe("= 7", reward))
    assert "latent_map" in files
    assert ("no reward" in html) == (reward is None)


def test_blanks_can_be_seen():
    html, _ = render_report([], before=make_probe(" "))
    assert "<code>␣</code>" in html and "<code></code>" not in html
    html, _ = render_report([], before=make_probe(""))
    assert "<code>∅</code>" in html


def test_a_thought_may_become_longer_or_shorter():
    probes = [make_probe("= 7"), {**make_probe("= 7"), "step": 5}]
    for index in (0, 1):
        for look in probes[index]["questions"]:
            look["tokens"] = look["tokens"] * 3
        html, _ = render_report([], before=probes[0], after=probes[1])
        Page(html)
        assert f"latent {len(probes[index]['questions'][0]['tokens'])}" in html
        assert f"latent {len(probes[index]['questions'][0]['tokens']) + 1}" not in html


def test_looks_at_other_questions_are_not_put_side_by_side():
    html, _ = render_report([], before=make_probe("= 7"), after={**make_probe("= 8"), "step": 5})
    assert "with latents, step 5" in html and "step 0" not in html and "= 7" not in html
    assert "before training, on the same questions" in missing_of(html)


def test_controls_are_told_from_other_figures():
    controls, others = by_control(
        {
            "policy/reward": 1.0,
            "before/eval_loss": 2.0,
            "preflight/no_latents/accuracy": 0.5,
            "preflight/gradient/assistant": 3.0,
            "eval_loss": 4.0,
            "note": "text",
        }
    )
    assert controls == {"policy": {"reward": 1.0}, "before": {"loss": 2.0}, "preflight/no_latents": {"accuracy": 0.5}}
    assert others == {"preflight/gradient/assistant": 3.0, "eval_loss": 4.0}
    assert list(by_control(dict(sorted(RESULTS.items())))[0]) == list(CONTROLS)  # not as their names sort


def test_a_supervised_run_has_its_page_too(tmp_path):
    trainer = make_sft_trainer(
        tmp_path, trainer_kwargs={"eval_dataset": tiny_dataset(4, 1)}, eval_strategy="steps", eval_steps=2
    )
    trainer.add_callback(LatentReportCallback(trainer, tiny_dataset(2, 1), tiny_reward, num_samples=2))
    trainer.train()
    folder = tmp_path / "run" / "report"
    assert {path.stem for path in folder.glob("*.png")} == {"optimization", "accuracy", "mean_and_sigma", "latent_map"}
    html = (folder / "report.html").read_text()
    for metric in ("loss", "eval_loss", "mean_token_accuracy", "eval_accuracy", "latent/mean_size"):
        assert f"<code>{metric}</code>" in html
    for title in ("Rewards: Total", "Groups with mixed rewards", "Time of a step", "Held-out controls"):
        assert f"<li>{title}" in missing_of(html)


def test_plots_of_an_earlier_run_in_the_folder_go(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    folder = tmp_path / "run" / "report"
    (folder / "run.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 1.0}]}))
    for name in ("probe_before.json", "probe_after.json", "../eval_results.json"):
        (folder / name).unlink()
    write_report(tmp_path / "run")
    assert [path.name for path in folder.glob("*.png")] == ["optimization.png"]


@pytest.mark.parametrize("log_history", [{"step": 1}, [{"loss": 1.0}], ["step"]])
def test_a_history_without_steps_is_refused(log_history):
    with pytest.raises(ValueError, match="`log_history` must be a list of dicts with a 'step'"):
        render_report(log_history)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"`output_dir=.*` has no report/run.json. Train with a `LatentReportCallback`"
    ):
        write_report(tmp_path)


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(ImportError, match=r'pip install "trl_dlr\[report\]"'):
        render_report([])
    with pytest.raises(ImportError, match=r'pip install "trl_dlr\[report\]"'):
        write_report(tmp_path)


# ---- In a browser ----

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_it_renders_in_a_browser_without_a_network_and_without_errors(run_dir, tmp_path):
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", "--window-size=1300,4000"]
    result = subprocess.run(
        [CHROMIUM, *options, "--enable-logging=stderr", (run_dir / "report" / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not [line for line in result.stderr.splitlines() if "CONSOLE" in line or "ERR_" in line]
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (4000, 1300)
    plots = pixels[1200:3800].reshape(-1, 3)
    blue = abs(plots - matplotlib.colors.to_rgb("#2563eb")).max(axis=1) < 0.02  # the first line of every plot
    assert blue.sum() > 2000
