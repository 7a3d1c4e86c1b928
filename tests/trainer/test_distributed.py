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
    "one": [sys.executable],
    "ddp": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "{}"],
    "zero2": [sys.executable, *f"-m accelerate.commands.launch --config_file {ZERO2} --num_processes {{}}".split()],
}


def run(folder, launcher, mode, num_processes=2, env=None, fails=False, **kwargs):
    folder.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    if launcher == "ddp":
        env["ACCELERATE_USE_CPU"] = "true"
    num_processes = 1 if launcher == "one" else num_processes
    command = [part.format(num_processes) for part in LAUNCHERS[launcher]]
    result = subprocess.run(
        [
            *[*command, "-m", "tests.trainer.distributed_worker", str(folder), mode],
            json.dumps({"num_processes": num_processes, **kwargs}),
        ],
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


def assert_learned_alike(tmp_path, launcher, num_processes, **kwargs):
    """One process and several end with the same weights after 4 steps on the same stored rollouts."""
    _, expected = run(tmp_path / "one", "one", "stored", **kwargs)
    logs, weights = run(tmp_path / "many", launcher, "stored", num_processes, **kwargs)
    assert [log["processes"] for log in logs] == [num_processes] * num_processes
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=1e-5)
    largest = max((weights[name] - tensor).abs().max().item() for name, tensor in expected.items())
    print(f"\n{launcher}, {num_processes} processes against one: weights differ by {largest:.1e} at most")
    if launcher == "zero2":
        assert {(log["engine"], log["stage"]) for log in logs} == {("DeepSpeedEngine", 2)}
        # Each process holds about its part of the trainable weights' optimizer state; the engine knows no other weights
        shares = [log["partition"] / log["trainable"] * num_processes for log in logs]
        assert all(1.0 <= share < 1.02 for share in shares)
        print(f"partitions of {logs[0]['trainable']}: {[log['partition'] for log in logs]}")
    else:
        assert {log["engine"] for log in logs} == {"DistributedDataParallel"}
    return logs


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=needs_compiler)])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_two_processes_learn_what_one_does_from_the_same_rollouts(tmp_path, launcher, loss_type):
    assert_learned_alike(tmp_path, launcher, 2, loss_type=loss_type, projection_learning_rate=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=needs_compiler)])
def test_eight_processes_learn_what_one_does_from_the_same_rollouts(tmp_path, launcher):
    kwargs = {"projection_learning_rate": 2e-3, "projection_max_grad_norm": 0.05, "max_grad_norm": 0.1}
    assert_learned_alike(tmp_path, launcher, 8, **kwargs)


@needs_compiler
def test_zero2_clips_the_projection_on_its_own_and_skips_steps_as_one_process_does(tmp_path):
    # The second of four rollouts has no reward. SGD, since AdamW's steps do not depend on the gradients' size
    limits = {"projection_max_grad_norm": 0.02, "max_grad_norm": 0.05, "optim": "sgd", "learning_rate": 0.1}
    kwargs = {"num_iterations": 1, "steps_without_rewards": [1], "lr_scheduler_type": "constant", **limits}
    logs = assert_learned_alike(tmp_path, "zero2", 2, **kwargs)
    one = json.loads((tmp_path / "one" / "run_0.json").read_text())
    assert logs[0]["skipped_steps"] == one["skipped_steps"] == [0.0, 1.0, 0.0, 0.0]
    for step in (0, 2, 3):  # the norm before clipping, far above both limits
        assert logs[0]["grad_norm"][step] == pytest.approx(one["grad_norm"][step], rel=1e-4)
        assert one["grad_norm"][step] > 0.2


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
    assert "checkpoint-3` was written by another run: `num_processes` was 2 in its run, and is 1 now." in error
