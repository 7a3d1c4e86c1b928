# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Two processes on the CPU, plain DDP and DeepSpeed ZeRO-2, against one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
ZERO2 = ROOT / "accelerate_configs" / "deepspeed_zero2_cpu.yaml"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles an extension with g++")
LAUNCHERS = {
    "one": [sys.executable, "-m"],
    "ddp": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"],
    "zero2": [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ZERO2), "-m"],
}


def run(folder, launcher, mode, env=None, fails=False, **kwargs):
    folder.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    if launcher == "ddp":
        env["ACCELERATE_USE_CPU"] = "true"
    num_processes = 1 if launcher == "one" else 2
    command = [*LAUNCHERS[launcher], "tests.trainer.distributed_worker", str(folder), mode]
    result = subprocess.run(
        [*command, json.dumps({"num_processes": num_processes, **kwargs})],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if fails:
        assert result.returncode != 0 and not (folder / "run" / "model.safetensors").exists()
        return result.stderr
    assert result.returncode == 0, result.stderr[-4000:]
    logs = [json.loads((folder / f"run_{i}.json").read_text()) for i in range(num_processes)]
    weights = [load_file(folder / f"weights_{i}.safetensors") for i in range(num_processes)]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], tensor) for name, tensor in other.items())
    return logs, weights[0]


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=needs_compiler)])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_two_processes_learn_what_one_does_from_the_same_rollouts(tmp_path, launcher, loss_type):
    kwargs = {"loss_type": loss_type, "projection_learning_rate": 2e-3}
    _, expected = run(tmp_path / "one", "one", "stored", **kwargs)
    logs, weights = run(tmp_path / "two", launcher, "stored", **kwargs)
    assert [log["processes"] for log in logs] == [2, 2]
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=1e-5)
    if launcher == "zero2":
        assert {(log["engine"], log["stage"]) for log in logs} == {("DeepSpeedEngine", 2)}
        # Each process holds about half of the trainable weights' optimizer state; the engine knows no other weights
        assert all(0.5 <= log["partition"] / log["trainable"] < 0.51 for log in logs)
    else:
        assert {log["engine"] for log in logs} == {"DistributedDataParallel"}


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=needs_compiler)])
def test_groups_that_span_processes_have_one_groups_statistics(tmp_path, launcher):
    # 8 trajectories per step in groups of 8 would be one group; here each process holds half of it
    logs, _ = run(tmp_path / "two", launcher, "rollouts", exploration_check_prompts=2)
    for key in ("reward", "frac_reward_mixed", "latent/kl", "latent/diversity"):
        assert logs[0][key] == logs[1][key], key
    assert logs[0]["reward"] and logs[0]["latent/kl"][0] == 0.0


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=needs_compiler)])
def test_processes_decode_their_share_of_what_all_have_chosen(tmp_path, launcher):
    # One group of 8 on two processes, 2 of which are decoded, wherever they are
    kwargs = {"prescreening_fraction": 0.25, "prescreening_warmup_rollouts": 1, "num_iterations": 1}
    logs, weights = run(tmp_path / "two", launcher, "rollouts", **kwargs)
    assert logs[0]["decoded"] + logs[1]["decoded"] == 8 + 3 * 2
    assert any(name.startswith("value_head.") for name in weights)  # `run` compares those of the two processes
    for key in ("reward", "prescreening/loss", "prescreening/reward_random", "completions/mean_length"):
        assert logs[0][key] == logs[1][key] != [], key
    assert logs[0]["main_model/decoded_fraction"] == [1.0, 0.25, 0.25, 0.25]


@needs_compiler
def test_a_resumed_zero2_run_equals_the_uninterrupted_one(tmp_path):
    # In the middle of a rollout, with a value head
    kwargs = {"prescreening_fraction": 0.25, "prescreening_warmup_rollouts": 1, "projection_learning_rate": 2e-3}
    straight, expected = run(tmp_path / "straight", "zero2", "rollouts", save_strategy="steps", save_steps=3, **kwargs)
    checkpoint = str(tmp_path / "straight" / "run" / "checkpoint-3")
    resumed, weights = run(tmp_path / "resumed", "zero2", "rollouts", checkpoint=checkpoint, **kwargs)
    assert any(name.startswith("value_head.") for name in weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert [log["loss"] for log in resumed] == [log["loss"] for log in straight]


@needs_compiler
def test_a_launch_that_lost_its_deepspeed_is_refused(tmp_path):
    error = run(tmp_path / "lost", "zero2", "rollouts", env={"ACCELERATE_USE_CPU": "true"}, fails=True)
    assert "ValueError: DeepSpeed is configured, but the environment has `ACCELERATE_USE_CPU`" in error
    assert not (tmp_path / "lost" / "run").exists()


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    run(tmp_path / "two", "ddp", "rollouts", save_strategy="steps", save_steps=3)
    checkpoint = str(tmp_path / "two" / "run" / "checkpoint-3")
    error = run(tmp_path / "one", "one", "rollouts", checkpoint=checkpoint, fails=True)
    assert "checkpoint-3` holds the rollout of 2 processes, and this run has 1." in error
