# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json

import pytest

from tests.launch import ROOT, run_python


BENCHMARK = ROOT / "examples" / "benchmarks" / "coconut_curriculum.py"
ARMS = ["start", "step", "token", "cot", "none"]


def run(folder, *arguments):
    path = folder / "figures.json"
    result = run_python(BENCHMARK, "--output_json", path, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout, json.loads(path.read_text())


def test_chains_are_worked_right(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    from coconut_curriculum import CurriculumBenchmarkArguments, chains

    train, test = chains(CurriculumBenchmarkArguments(num_train_questions=50, num_eval_questions=10), seed=0)
    assert not set(train["prompt"]) & set(test["prompt"])
    for row in [*train, *test]:
        assert str(eval(row["prompt"].removesuffix("=")) % 10) == row["answer"] == row["completion"].removeprefix("#")
        for step in row["steps"]:
            question, result = step.split("=")
            assert eval(question) % 10 == int(result)
        assert row["steps"][-1].endswith(f"={row['answer']}")


def test_every_arm_runs(tmp_path):
    small = "--seeds 0 --num_train_questions 64 --num_eval_questions 8 --cot_epochs 1 --epochs_per_stage 1"
    stdout, figures = run(tmp_path, *small.split(), "--last_epochs", "1")
    assert list(figures["accuracy"][0]) == ARMS
    assert all(0 <= value <= 1 for value in figures["accuracy"][0].values())
    assert "1 + 3 steps" in stdout


@pytest.mark.slow  # about two minutes of CPU time a seed
def test_stages_by_step_are_at_least_as_good_as_stages_by_token(tmp_path):
    stdout, figures = run(tmp_path)
    print(stdout)
    for accuracy in figures["accuracy"]:
        assert accuracy["step"] >= accuracy["token"]
