# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import importlib.util
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerState

from tests.launch import Job
from tests.tiny import tiny_dataset
from tests.trainer.test_distributed import needs_compiler
from tests.trainer.test_latent_grpo_trainer import length_reward, make_trainer, weights
from tests.trainer.test_latent_sft_trainer import make_sft_trainer
from trl_dlr import LatentReportCallback
from trl_dlr.report import callback as report_callback
from trl_dlr.report import page as report
from trl_dlr.report import write_report


pytest.importorskip("matplotlib")


def make_reporting(folder, callback_kwargs=None, make=make_trainer, **kwargs):
    trainer = make(folder, **kwargs)
    settings = {"reward_func": length_reward, "num_questions": 2, "num_samples": 2, **(callback_kwargs or {})}
    callback = LatentReportCallback(trainer, tiny_dataset(4, 1), **settings)
    trainer.add_callback(callback)
    return trainer, callback


@pytest.fixture
def no_plots(monkeypatch):
    """Pages without their plots, which take seconds; tests/evaluation/test_report.py has those."""
    monkeypatch.setattr(report, "draw_plots", lambda *args: ({}, []))


def read(folder, name):
    return json.loads((folder / "run" / "report" / name).read_text())


class Watch(TrainerCallback):
    """The steps that the page has after each step of training."""

    def __init__(self, folder):
        self.path, self.steps = folder / "run" / "report" / "run.json", []

    def on_step_end(self, args, state, control, **kwargs):
        written = self.path.exists()
        self.steps.append(json.loads(self.path.read_text())["log_history"][-1]["step"] if written else None)


@pytest.mark.parametrize("make", [make_trainer, make_sft_trainer])
def test_training_is_the_same_bit_for_bit_with_and_without_it(tmp_path, make):
    kwargs = {"max_steps": 4}  # a page in the middle, and one at the end
    if make is make_trainer:
        kwargs |= {"prescreening_fraction": 0.5, "prescreening_warmup_rollouts": 1}
    found = []
    for name in ("with", "without"):
        torch.manual_seed(0)
        if name == "with":
            settings = {"report_steps": 3, "probe_during_training": True}
            trainer, _ = make_reporting(tmp_path / name, settings, make, **kwargs)
        else:
            trainer = make(tmp_path / name, **kwargs)
        start = weights(trainer.model)
        trainer.train()
        assert any(not torch.equal(start[key], tensor) for key, tensor in weights(trainer.model).items())
        logged = [
            {key: value for key, value in entry.items() if "time" not in key and "per_second" not in key}
            for entry in trainer.state.log_history
        ]
        found.append((weights(trainer.model), torch.random.get_rng_state(), logged))
    assert all(torch.equal(found[0][0][key], tensor) for key, tensor in found[1][0].items())
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_the_page_goes_along_with_training(no_plots, tmp_path):
    trainer, _ = make_reporting(tmp_path, {"report_steps": 3})
    watch = Watch(tmp_path)
    trainer.add_callback(watch)
    trainer.train()
    # A step's log comes after its end
    assert watch.steps == [None, None, None, 3, 3, 3, 6, 6]
    assert read(tmp_path, "run.json")["log_history"] == trainer.state.log_history
    assert read(tmp_path, "run.json")["steps_per_rollout"] == 2  # num_iterations
    assert (read(tmp_path, "probe_before.json")["step"], read(tmp_path, "probe_after.json")["step"]) == (0, 8)


def test_a_page_that_cannot_be_written_ends_no_training(no_plots, tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    trainer, _ = make_reporting(tmp_path, {"report_steps": 3})
    monkeypatch.setattr("trl_dlr.report.callback.write_report", full)
    trainer.train()
    assert trainer.state.global_step == 8 and "The report could not be written" in caplog.text
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize(("probe_during_training", "probes"), [(False, [0, 8]), (True, [0, 3, 6, 8, 8])])
def test_nothing_is_decoded_during_training_unless_asked(
    no_plots, tmp_path, monkeypatch, probe_during_training, probes
):
    settings = {"report_steps": 3, "probe_during_training": probe_during_training}
    trainer, _ = make_reporting(tmp_path, settings)
    seen, take_probe = [], report_callback.take_probe

    def counting(*args, **kwargs):
        seen.append(trainer.state.global_step)
        return take_probe(*args, **kwargs)

    monkeypatch.setattr(report_callback, "take_probe", counting)
    trainer.train()
    assert seen == probes  # the ninth log is the summary of the run


def test_a_resumed_run_keeps_its_history_and_its_first_look(no_plots, tmp_path):
    first, _ = make_reporting(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    first.train()
    before = read(tmp_path, "probe_before.json")
    # Another reward: taken anew, the first look would be another
    other, _ = make_reporting(
        tmp_path, {"reward_func": lambda completions, **kwargs: [9.0] * len(completions)}, max_steps=8
    )
    other.train(resume_from_checkpoint=True)
    assert read(tmp_path, "probe_before.json") == before
    history = [entry["step"] for entry in read(tmp_path, "run.json")["log_history"] if "loss" in entry]
    assert history == list(range(1, 9))
    after = read(tmp_path, "probe_after.json")
    assert after["step"] == 8
    assert {sample["reward"] for question in after["questions"] for sample in question["samples"]} == {9.0}


def test_a_run_that_starts_anew_does_not_show_an_earlier_one(no_plots, tmp_path):
    make_reporting(tmp_path)[0].train()
    (tmp_path / "run" / "eval_results.json").write_text(json.dumps({"policy/accuracy": 0.123}))
    trainer, _ = make_reporting(tmp_path, {"report_steps": 2})
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                seen.append((tmp_path / "run" / "report" / "report.html").read_text())

    trainer.add_callback(Look())
    trainer.train()
    assert "completions after training</li>" in seen[0] and "0.123" not in seen[0]
    page = tmp_path / "run" / "report" / "report.html"
    assert "0.123" not in page.read_text()
    write_report(tmp_path / "run")
    assert "0.123" in page.read_text()


def test_evaluation_outside_of_training_writes_nothing(no_plots, tmp_path):
    trainer, _ = make_reporting(tmp_path, {"report_steps": 1}, trainer_kwargs={"eval_dataset": tiny_dataset(4, 1)})
    trainer.evaluate()
    assert not (tmp_path / "run" / "report").exists()
    trainer.train()
    page = tmp_path / "run" / "report" / "report.html"
    before = page.stat().st_mtime_ns
    trainer.evaluate()
    assert page.stat().st_mtime_ns == before


def test_other_processes_do_nothing(tmp_path, monkeypatch):
    trainer, callback = make_reporting(tmp_path, {"report_steps": 1})
    monkeypatch.setattr(report_callback, "take_probe", lambda *args, **kwargs: pytest.fail("decoded"))
    state = TrainerState(is_world_process_zero=False, max_steps=8)
    for moment in ("on_train_begin", "on_log", "on_train_end"):
        getattr(callback, moment)(trainer.args, state, trainer.control)
    assert not (tmp_path / "run" / "report").exists()


def test_after_sigterm_the_time_is_not_spent_on_decoding(no_plots, tmp_path):
    trainer, _ = make_reporting(tmp_path)

    class Preempt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.add_callback(Preempt())
    with pytest.raises(SystemExit):
        trainer.train()
    assert read(tmp_path, "run.json")["run_summary"]["Step"] == "4 of 8"
    assert not (tmp_path / "run" / "report" / "probe_after.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_questions": 0}, "`num_questions` must be at least 1, got 0"),
        ({"num_samples": 1}, "`num_samples` must be at least 2, got 1"),
        ({"report_steps": 0}, "`report_steps` must be at least 1, got 0"),
        ({"questions": [{"prompt": "A12"}]}, "`questions` must be a `Dataset`"),
        ({"questions": tiny_dataset(2, 0).remove_columns("prompt")}, "`questions` must be .* a column 'prompt'"),
        ({"trainer": Trainer.__new__(Trainer)}, "`trainer` must be one of this package's trainers, got Trainer"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, message):
    arguments = {"trainer": make_trainer(tmp_path), "questions": tiny_dataset(2, 0), **change}
    with pytest.raises(ValueError, match=message):
        LatentReportCallback(**arguments)


def test_without_matplotlib_it_is_refused_before_training(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(ImportError, match=r'pip install "trl_dlr\[report\]"'):
        LatentReportCallback(make_trainer(tmp_path), tiny_dataset(2, 0))


@pytest.mark.slow  # two launches of two processes
@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=needs_compiler)])
def test_two_processes_train_the_same_with_and_without_it(tmp_path, launcher):
    found = {}
    for name in ("with", "without"):
        program = ["-m", "tests.report.callback_worker", tmp_path / name, name]
        result = Job(program, tmp_path / "log", launcher, 2).wait()
        assert result.returncode == 0, result.stderr[-3000:]
        found[name] = load_file(tmp_path / name / "weights.safetensors")
    assert all(torch.equal(found["without"][key], tensor) for key, tensor in found["with"].items())
    assert read(tmp_path / "with", "run.json")["run_summary"]["Processes"] == 2
    assert read(tmp_path / "with", "probe_after.json")["step"] == 4
    assert not (tmp_path / "without" / "run" / "report").exists()
