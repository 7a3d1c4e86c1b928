# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The benchmarks run, and say what they promise to: on random weights, so the figures themselves mean nothing."""

import importlib
import json
import math
import re
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from tests.launch import ROOT, run_python


BENCHMARKS = ROOT / "examples" / "benchmarks"
TINY = ["--shape", "tiny", "--max_completion_length", "4", "--repeats", "2", "--warmup", "1"]


def run(script, tmp_path, *arguments):
    """Standard output and the JSON's content."""
    path = tmp_path / "figures.json"
    result = run_python(BENCHMARKS / script, *TINY, "--output_json", path, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    content = json.loads(path.read_text())
    assert content["benchmark"] == Path(script).stem
    assert content["settings"]["shape"] == "tiny" and content["machine"]["cpu_cores"] > 0
    assert set(content["versions"]) == {"python", "torch", "transformers", "trl"}
    return result.stdout, content["figures"]


def check_summary(figure, name=""):
    assert set(figure) == {"median", "min", "max"}, name
    assert 0 < figure["min"] <= figure["median"] <= figure["max"], (name, figure)


def test_step_time_against_trl(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    stdout, figures = run(
        "step_time.py", tmp_path, "--num_generations", "16", "--num_questions", "2", "--output_png", plot
    )
    assert set(figures) == {"ours", "trl", "trl/ours", "ours_breakdown_seconds", "ours_decoding", "steps"}
    for contender in ("ours", "trl", "trl/ours"):
        for name in ("seconds", "rollout_seconds", "update_seconds", "main_model_tokens", "peak_memory_mib"):
            check_summary(figures[contender][name], name)
    assert len(figures["steps"]["ours"]) == len(figures["steps"]["trl"]) == 2
    for step in figures["steps"]["ours"] + figures["steps"]["trl"]:
        assert step["seconds"] == pytest.approx(step["rollout_seconds"] + step["update_seconds"])

    num_decoded = 2 * math.ceil(0.18 * 16)
    assert figures["ours"]["num_decoded"]["median"] == num_decoded
    assert figures["trl"]["num_decoded"]["median"] == 32
    # "What is a + b?" is 6 words. Ours reads a question once, then each row's latents and completion.
    assert figures["ours"]["main_model_tokens"]["median"] == 2 * 6 + num_decoded * (4 + 4)
    # TRL's rows read the prompt and all but the last token in generation, and everything again in the loss
    assert figures["trl"]["main_model_tokens"]["median"] == 32 * (6 + 3 + 6 + 4)
    for name in ("time/sample", "time/decode", "time/reward", "time/optimize"):
        check_summary(figures["ours_breakdown_seconds"][name], name)
    check_summary(figures["ours_decoding"]["share_of_copy_bandwidth"])
    assert "trl/ours" in stdout and plot.stat().st_size > 1000


def test_overhead(tmp_path):
    stdout, figures = run("overhead.py", tmp_path, "--num_generations", "16", "--latent_sampling", "autoregressive")
    for name in ("step", "decode", "sample", "score", "parts"):
        check_summary(figures[f"{name}_seconds"], name)
    parts = [figures[f"{name}_seconds"] for name in ("decode", "sample", "score")]
    assert sum(part["min"] for part in parts) <= figures["parts_seconds"]["max"]
    assert figures["overhead"]["median"] > 0  # a step has all of its parts, and at this size far more
    assert figures["num_decoded_per_question"] == math.ceil(0.18 * 16)
    assert "Overhead: " in stdout


def test_scaling(tmp_path):
    stdout, figures = run(
        "scaling.py",
        tmp_path,
        *["--vary", "g", "k", "--rounds", "1", "--num_decoded", "2"],
        *["--g_values", "8", "16", "--k_values", "2", "16", "--num_generations", "16"],
    )
    assert set(figures) == {"g", "k"}
    for varied, values in {"g": ["8", "16"], "k": ["2", "16"]}.items():
        assert list(figures[varied]["step_seconds"]) == values
        for figure in figures[varied]["step_seconds"].values():
            check_summary(figure)
        assert all(math.isfinite(figures[varied][name]) for name in ("exponent", "slope_seconds", "r_squared"))
    assert stdout.count("exponent") == 2


def test_engines(tmp_path):
    stdout, figures = run("engines.py", tmp_path, "--engines", "transformers", "plain", "--dtype", "float32")
    assert set(figures) == {"transformers", "plain"}
    for figure in figures.values():
        for name in ("seconds", "tokens_per_second", "tokens_per_cpu_second"):
            check_summary(figure[name], name)
        assert figure["new_tokens"]["min"] == 16 * 4  # full length
    check_summary(figures["transformers"]["speedup_seconds_over_plain"])
    assert figures["plain"]["agreement"]["min"] == 1.0
    assert "tokens_per_cpu_second" in stdout


@pytest.mark.parametrize(
    ("experiment", "rows", "figures"),
    [
        ("methods", ["DLR, Gaussian", "Latent-GRPO, all three remedies"], ["before", "after", "steps", "seconds"]),
        ("prescreening", ["6 of 32, `top_bottom`", "groups of 6"], ["decoded", "mean accuracy", "seeds"]),
        ("few_right", ["3 of 16, `top_random`"], ["decoded", "mean accuracy", "seeds"]),
        ("stop_cost", ["c = 0.1"], ["untrained", "accuracy", "mean length at the end"]),
        ("warm_start", ["d = 64"], ["untrained", "2 supervised steps", "then 1 steps of RL", "3 steps of RL alone"]),
        ("latent_rl", ["after the value phase", "stopped"], ["step", "predicted accuracy", "AUC of the head"]),
    ],
)
def test_the_small_world(experiment, rows, figures, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import small_world

    from tests import learners

    path, tiny_dataset = tmp_path / "figures.json", learners.tiny_dataset
    monkeypatch.setattr(learners, "tiny_dataset", lambda num_rows, **kwargs: tiny_dataset(num_rows // 10, **kwargs))
    small_world.main(small_world.SmallWorldArguments(experiment, rows, [0], steps=0.005, output_json=str(path)))
    content = json.loads(path.read_text())
    assert content["settings"]["seeds"] == [0] and list(content["figures"]) == rows
    for (run,) in content["figures"].values():
        assert set(figures) <= set(run)
        assert all(value >= 0 or math.isnan(value) for value in run.values())  # no AUC where all are wrong
    columns, lines = (rows, list(run)) if experiment == "latent_rl" else (list(run), rows)
    table = capsys.readouterr().out.splitlines()[-2 - len(lines) :]
    assert table[0] == f"|  | {' | '.join(columns)} |"
    assert all(line.startswith(f"| {name} | ") for line, name in zip(table[2:], lines, strict=True))


@pytest.fixture
def paper_arms(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_arms

    return paper_arms


@pytest.mark.parametrize("arm", ["GMPO", "GMPO, for seconds"])
def test_an_arm_is_what_it_is_called(paper_arms, tmp_path, arm):
    main_model, train, *_ = paper_arms.world_of("told")
    config = {"num_iterations": 1, "learning_rate": 1e-4, "max_completion_length": 3}
    trainer = paper_arms.make_trainer(arm, config, main_model, train, paper_arms.FinalAnswer(), str(tmp_path), 0)
    assert type(trainer) is paper_arms.GMPOTrainer


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("=7", (True, False)),  # which is right, and skips a step
        ("= 4 = 7", (True, True)),
        ("+ + = 4 = 7", (True, True)),
        ("- - = 4 = 7", (True, True)),  # what counts is the result
        ("=5=7", (True, False)),
        ("=4=8", (False, True)),
        ("=4=7=", (False, False)),
        ("A13", (False, False)),
        ("", (False, False)),
    ],
)
def test_steps_are_checked(paper_arms, completion, verdict):
    assert paper_arms.judged(completion, "=4=7") == verdict


def test_the_spread_of_gradients_is_measured_without_bias(paper_arms):
    from paper_tables import slopes

    noise = torch.randn(400, 100, 50, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    found = [paper_arms.normalized_variance(1 + 3 * sample) for sample in noise]
    assert sum(found) / 400 == pytest.approx(9, rel=0.05)  # without the correction, it would be 8.3
    lines = [{"seed": 0, "num_tokens": n, "variance": 5 * n**2} for n in (2, 4, 8)]
    assert slopes(lines, "num_tokens") == pytest.approx([2])


def test_stability_of_known_rewards(paper_arms):
    curve = [{"decodes": 0, "accuracy": 0.1}, {"decodes": 500, "accuracy": 0.9}, {"decodes": 1024, "accuracy": 0.4}]
    # Four parts of 256 decodes, the last two of which count, and one that came after the budget
    rewards = [(256, 5.0), (256, -5.0), (128, 0.0), (128, 1.0), (256, 0.3), (256, 9.0), (256, 9.0)]
    figures = paper_arms.stability(curve, rewards, [1.0, 3.0], 1024 - 256, per_question=16)
    assert figures["collapsed"] == 1.0
    assert figures["reward std"] == pytest.approx(0.1)
    assert figures["by drawing questions"] == pytest.approx(2 * math.sqrt(0.7 * 0.3 / 16))  # means of 0.4
    assert figures["gradient norm cv"] == pytest.approx(0.5)


def test_a_run_of_the_paper_tables_spends_both_budgets(paper_arms):
    shared = {"world": "told", "seed": 0, "decodes": 300, "samples": 4}
    screened = {**paper_arms.DLR, **paper_arms.PRESCREENED, "prescreening_warmup_rollouts": 0}
    dlr = paper_arms.run("learn", arm="DLR, K/G = 0.18", config=screened, seconds=0.0, **shared)
    assert [point["decodes"] for point in dlr["curve"]][-1] == 2 * 6 * 32  # the first multiple of 192 past the budget
    before = paper_arms.run("learn", arm="untrained", config={}, seconds=0.0, **shared)
    names = "skill", "skill against the letter"
    assert all(dlr[name] == before[name] > 0.9 for name in names)
    # A prompt of three tokens for each question, and for each answer two latents and two of three tokens at most
    assert 64 * 3 + 384 * 2 < dlr["tokens"] <= 64 * 3 + 384 * 4
    seconds = 2 * dlr["seconds"]
    grpo = paper_arms.run("learn", arm="GRPO", config={"learning_rate": 0.1}, seconds=seconds, **shared)
    assert grpo["curve"][-1]["seconds"] >= seconds and grpo["curve"][-1]["decodes"] >= 300
    assert all(grpo[name] < before[name] for name in names)
    for run in (dlr, grpo):
        assert run["pass@1"] <= run["pass@2"] <= run["pass@4"] and run["parameters"] > 80_000


def test_the_trainable_arm_changes_the_main_model(paper_arms):
    shared = {"world": "told", "arm": "DLR", "seed": 0, "decodes": 256, "seconds": 0.0, "samples": 0}
    config = {**paper_arms.DLR, **paper_arms.HYBRID}
    run = paper_arms.run("learn", config={**config, "main_model_rate": 1e-4}, **shared)
    frozen = paper_arms.run("learn", config=config, **shared)
    assert run["parameters"] - frozen["parameters"] > 80_000


def test_what_was_tried_for_fewer_decodes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import decodes

    tried = {
        arm: {**decodes.ARMS[arm], "num_iterations": 5} for arm, new in decodes.CHANGES.items() if "trainer" in new
    }
    runs = {arm: decodes.run(arm, config, seed=0, limit=500) for arm, config in tried.items()}
    for arm, run in runs.items():
        (point,) = run["curve"]  # after one rollout of 256 or two
        # Groups that are drawn again are decoded again: at the start, some of 32 are alike
        assert (point["decodes"] > 256 * point["rollouts"]) == ("drawn again" in arm), arm
        assert run["decodes, policy"] == run["decodes, mean_latents"] == 500 and 0 <= point["policy"] < 0.9


def test_the_slope_and_the_exponent_of_known_curves(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from scaling import fit

    assert fit([1, 2, 3], [5, 7, 9]) == pytest.approx((2, 3, 1))
    x = [1.0, 2.0, 4.0]
    exponent, _, r_squared = fit([math.log(value) for value in x], [math.log(3 * value**0.5) for value in x])
    assert (exponent, r_squared) == pytest.approx((0.5, 1))


def test_chains_are_worked_right(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from coconut_curriculum import CurriculumBenchmarkArguments, chains

    train, test = chains(CurriculumBenchmarkArguments(num_train_questions=50, num_eval_questions=10), seed=0)
    assert not set(train["prompt"]) & set(test["prompt"])
    for row in [*train, *test]:
        assert str(eval(row["prompt"].removesuffix("=")) % 10) == row["answer"] == row["completion"].removeprefix("#")
        for step in row["steps"]:
            question, result = step.split("=")
            assert eval(question) % 10 == int(result)
        assert row["steps"][-1].endswith(f"={row['answer']}")


def test_every_arm_of_the_curriculum_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from coconut_curriculum import CurriculumBenchmarkArguments, main

    sizes = {"num_train_questions": 64, "num_eval_questions": 8, "cot_epochs": 1, "epochs_per_stage": 1}
    path = tmp_path / "figures.json"
    main(CurriculumBenchmarkArguments([0], **sizes, last_epochs=1, output_json=str(path)))
    (accuracy,) = json.loads(path.read_text())["accuracy"]
    assert list(accuracy) == ["start", "step", "token", "cot", "none"]
    assert all(0 <= value <= 1 for value in accuracy.values())
    assert "1 + 3 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("completion", "answer", "question", "right"),
    [
        ("16", "16", "What is 4 + 12?", True),
        ("4 + 12 = 16", "16", "What is 4 + 12?", True),
        ("The answer is 16.", "16", "What is 4 + 12?", True),
        ("4 + 12 is equal to 16. This", "16", "What is 4 + 12?", True),
        ("22 - 78 = -56", "-56", "22 - 78 =", True),
        ("To find 4 + 12, we", "16", "What is 4 + 12?", False),  # left to do
        ("4 + 12", "16", "What is 4 + 12?", False),
        ("What is 4 + 12?", "16", "What is 4 + 12?", False),
        ("The answer is 15 or 16", "16", "What is 4 + 12?", False),
        ("16. 17. 18.", "16", "What is 4 + 12?", False),
        ("15 = 16", "16", "What is 4 + 12?", False),
        ("56", "-56", "22 - 78 =", False),
        ("Oslo", "Oslo", "What is the capital of Norway?", True),
        ("The capital of Norway is Oslo.", "Oslo", "What is the capital of Norway?", True),
        ("The capital is Rome. It is Oslo.", "Oslo", "What is the capital of Norway?", False),
        ("Oslo. Rome. Paris.", "Oslo", "What is the capital of Norway?", False),
        ("Rome is Oslo", "Oslo", "What is the capital of Norway?", False),
        ("The capital of Norway is not Oslo", "Oslo", "What is the capital of Norway?", False),
        ('The opposite of "hot" is "cold."', "cold", 'What is the opposite of "hot"?', True),
        ('The opposite of "hot" is "hot"', "cold", 'What is the opposite of "hot"?', False),
    ],
)
def test_the_judge_of_the_rivals_pays_one_answer_that_is_stated(completion, answer, question, right, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from tasks import is_right

    assert is_right(completion, answer, question, frozenset({"oslo", "rome", "paris", "cold", "hot"})) is right


def test_questions_of_the_rivals_are_held_out_and_cannot_be_guessed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from rivals import USED
    from tasks import TASKS, same_question

    assert same_question("What is 4 * 12?") == same_question("What is 12 * 4?")
    assert same_question("What is 4 - 12?") != same_question("What is 12 - 4?")
    for name in USED:
        task, pilot = TASKS[name](), TASKS[name]().for_pilot()
        parts = [set(map(same_question, each["question"])) for each in (pilot.train, pilot.test, task.test)]
        assert not (parts[0] & parts[1] or parts[2] & (parts[0] | parts[1])), name
        assert len(pilot.train) + len(pilot.test) == len(task.train) and len(pilot.test) >= 27, name
        assert len(task.test) >= 36 and task.best_constant() < 0.2, name
        for data in (task.train, task.test):  # the judge takes each gold answer, and no other's
            assert set(task.correct(data["answer"], data["answer"], data["question"])) == {1.0}, name
            others = [*data["answer"][1:], data["answer"][0]]
            paid = task.correct(others, data["answer"], data["question"])
            assert [value > 0 for value in paid] == [a == b for a, b in zip(others, data["answer"], strict=True)]


def test_tables_of_the_rivals_come_from_the_file_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rivals

    path = tmp_path / "runs.jsonl"
    args = rivals.RivalArguments(
        arms=["grpo_lora", "dlr"], tasks=["addition"], seeds=[0, 1], seconds=[10.0, 20.0], runs=str(path)
    )

    def line(settings, accuracies, memory):
        curve = [
            {"seconds": 10.0 * i, "steps": i, "decodes": 32 * i, "accuracy": value}
            | ({"accuracy_shuffled": 0.25, "accuracy_plain": 0.3, "pass@8": 1.0} if settings["arm"] == "dlr" else {})
            for i, value in enumerate(accuracies)
        ]
        rest = {"added_memory": memory, "trained": 5}
        if settings["arm"] == "grpo_lora":
            rest |= {"others": {"products": 0.5}, "log_likelihood": -2.0}
        return json.dumps({"settings": settings, "figures": {"curve": curve, **rest}})

    lines = [
        line(each, [0.2, 0.9 if each["choice"] in (1e-3, " briefly") else 0.4], 8.0)
        for each in rivals.pilot_settings(args)
    ]
    common = {"task": "addition", "seconds": [10.0, 20.0], "is_pilot": False}
    for seed in (0, 1):
        lines.append(line({"arm": "grpo_lora", **common, "seed": seed, "choice": 1e-3}, [0.2, 0.6, 0.5], 300.0))
        lines.append(line({"arm": "dlr", **common, "seed": seed, "choice": " briefly"}, [0.2, 0.49, 0.75], 75.0))
    path.write_text("\n".join(lines) + "\n")
    read = [{**one["settings"], **one["figures"]} for one in map(json.loads, lines)]
    choices = rivals.best_choices([one for one in read if one["is_pilot"]])
    assert choices["grpo_lora", "addition"] == 1e-3 and choices[rivals.RUNNER_UP, "addition"] == 3e-4
    assert choices["dlr", "addition"] == choices["sft_dlr", "addition"] == " briefly"
    before = path.read_text()
    rivals.main(args)
    assert path.read_text() == before  # nothing was missing
    out = capsys.readouterr().out
    assert "| grpo_lora | 0.001 | **0.90** |" in out and "| dlr | 'Answer: ' | 0.40 |" in out
    assert "| grpo_lora | 0.50 [0.34, 0.66] |" in out and "| dlr | 0.75 [0.59, 0.86] |" in out
    assert "| grpo_lora | 0.50 / 0.50 |" in out
    assert "| addition | dlr | ' briefly' | 0.30 | 0.20 | 1.00 | 0.75 | 0.25 |" in out
    assert "| grpo_lora | 20 | 2 | 64 | 5 | 300 | 0.50 | -2.000 | 2 of 2 |" in out
    assert "| dlr | 20 | 2 | 64 | 5 | 75 | unchanged | unchanged | 0 of 2 |" in out
    assert (
        "| addition | 0.001 | 0.50 | 20 | 10 | 0.50 | 0.60 | 10 | 20 | 2.00 | 0.25 |" in out
    )  # within 0.02 of its end, of its best


def test_a_file_that_cannot_be_written_is_told_before_hours_of_measuring(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common
    import warm_start

    for arguments in (common.BenchmarkArguments, warm_start.WarmStartArguments):
        with pytest.raises(ValueError, match=r"The folder of '.*nowhere/x.json' does not exist"):
            arguments(output_json=str(tmp_path / "nowhere" / "x.json"))


@pytest.mark.parametrize("name", ["coconut_curriculum", "warm_start"])
@pytest.mark.parametrize("accuracy", [[0.25], [0.25, 0.25], [0.0, 0.5], [1.0, 1.0]])
def test_an_interval_lies_between_0_and_1_and_has_a_width(name, accuracy, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script, found = importlib.import_module(name), iter(accuracy)
    monkeypatch.setattr(script, "run_seed", lambda *args: {"arm": next(found)})
    monkeypatch.setattr(script, "logging", MagicMock(), raising=False)
    monkeypatch.setattr(script, "load_smollm2", lambda: (MagicMock(), None), raising=False)
    arguments = script.WarmStartArguments if name == "warm_start" else script.CurriculumBenchmarkArguments
    script.main(arguments(seeds=list(range(len(accuracy)))))
    low, high = map(float, re.search(r"\[([^, ]+), (.+)\]   \d", capsys.readouterr().out).groups())
    assert 0 <= low < high <= 1


def test_the_parts_for_a_gpu_run_small_without_one(tmp_path):
    gpu = BENCHMARKS / "gpu.py"
    result = run_python(gpu, "--output_dir", tmp_path, "--parts", "decoding", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "no GPU at hand" in result.stdout
    part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["decoding"]
    assert part["status"] == 0 and part["figures"]["plain, agreement"] == 1
    # A part that fails is said to have, and ends the script so
    (tmp_path / "step.json").mkdir()  # where its figures should go
    result = run_python(gpu, "--output_dir", tmp_path, "--parts", "step", cwd=tmp_path)
    assert result.returncode == 1 and "step: FAILED" in result.stdout


def test_what_is_left_out_on_a_gpu_is_there():
    for line in (ROOT / "tests" / "gpu" / "deselected.txt").read_text().splitlines():
        path, name = line.removeprefix("--deselect=").split("::")
        assert f"def {name}(" in (ROOT / path).read_text(), line


def test_predictions_are_those_of_the_measured_parts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    simulation = importlib.import_module("simulation")
    # A GPU that takes 1 ms per layer and reads 1 TB per second
    made = []
    for shape, num_layers, num_rows in (("llama-1.3b", 24, 3), ("llama2-7b", 32, 5), ("llama2-7b", 4, 64)):
        layers, weights, cache = simulation.sizes(shape, num_layers)
        token = 1e-3 * layers + (weights + num_rows * simulation.POSITIONS * cache) / 1e12
        made.append({"shape": shape, "num_layers": num_layers, "num_rows": num_rows})
        made[-1]["seconds"] = simulation.NUM_NEW * token
    assert simulation.fit(made) == pytest.approx((1e-3, 1e12, 0.0), rel=1e-6, abs=1e-9)

    assert simulation.sizes("llama2-7b")[1] == pytest.approx(2 * (6.74e9 - 32000 * 4096), rel=1e-2)  # all but a table
    stdout, figures = run("simulation.py", tmp_path)
    measured = json.loads(simulation.MEASURED.read_text())
    one = figures["llama2-7b, 1 GPUs, K = 12"]
    assert one["seconds"] == pytest.approx(measured["step_7b"]["seconds"], rel=0.1)
    assert simulation.fit(measured["decoding"])[2] < 0.1 and "the fit is off by" in stdout
    for name, figure in figures.items():
        assert figure["seconds"] == pytest.approx(sum(value for part, value in figure.items() if part != "seconds"))
        assert figure["decoding"] <= figures[name.replace("K = 12", "K = 64")]["decoding"]
    assert "llama2-70b, 1 GPUs, K = 12" not in figures and "llama2-70b, 8 GPUs, K = 12" in figures
