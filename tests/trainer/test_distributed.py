# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Two processes on the CPU, plain DDP and DeepSpeed ZeRO-2, against one."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.experimental.latent_rl.test_latent_rl_trainer import make_trainer as make_latent_rl_trainer
from tests.launch import ROOT, Job
from tests.tiny import random_main_model
from tests.trainer.test_coconut_sft_trainer import make_coconut_trainer
from tests.trainer.test_latent_grpo_trainer import make_trainer
from tests.trainer.test_latent_sft_trainer import make_sft_trainer
from tests.trainer.test_soft_token_grpo_trainer import make_trainer as make_soft_token_trainer
from trl_dlr import LatentPolicyModel


ZERO2 = ROOT / "accelerate_configs" / "deepspeed_zero2_cpu.yaml"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles an extension with g++")
LAUNCHERS = {
    "one": [sys.executable],
    "ddp": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "{}"],
    "zero2": [sys.executable, *f"-m accelerate.commands.launch --config_file {ZERO2} --num_processes {{}}".split()],
}
LAUNCHERS["zero2_bf16"] = [*LAUNCHERS["zero2"], "--mixed_precision", "bf16"]  # as on GPUs


def program(folder, mode, num_processes, script="distributed_worker", **kwargs):
    settings = json.dumps({"num_processes": num_processes, **kwargs})
    return ["-m", f"tests.trainer.{script}", str(folder), mode, settings]


def start(folder, mode, **kwargs):
    """Two processes of DeepSpeed under the launcher itself."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [part.format(2) for part in LAUNCHERS["zero2"]] + program(folder, mode, 2, **kwargs)
    with open(folder / "stderr.txt", "w") as stderr:
        return subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )


def finish(process, folder, timeout=600):
    """Exit status and what was printed to stderr. A job that hangs is killed, all of it."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, (folder / "stderr.txt").read_text()


def launch(folder, launcher, mode, num_processes=2, fails=False, env=None, num_nodes=1, **kwargs):
    """What was printed to stderr."""
    command = program(folder, mode, num_processes, **kwargs)
    done = Job(command, folder, launcher, num_processes, num_nodes, env=env).wait()
    assert (done.returncode != 0) == fails, done.stderr[-4000:]
    return done.stderr


def run(folder, launcher, mode, num_processes=2, **kwargs):
    num_processes = 1 if launcher == "one" else num_processes
    launch(folder, launcher, mode, num_processes, **kwargs)
    return read(folder, num_processes)


def read(folder, num_processes=2):
    """What each process has written of a run, and the weights, which are those of all."""
    logs = [json.loads((folder / f"run_{i}.json").read_text()) for i in range(num_processes)]
    weights = [load_file(folder / f"weights_{i}.safetensors") for i in range(num_processes)]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], tensor) for name, tensor in other.items())
    return logs, weights[0]


def assert_alike(one, many, launcher, num_processes=2):
    """One process and several have ended with the same weights."""
    (_, expected), (logs, weights) = read(one, 1), read(many, num_processes)
    assert [log["processes"] for log in logs] == [num_processes] * num_processes
    for name, tensor in expected.items():
        # Adam moved them by some 1e-3; where a gradient is next to nothing, its rounding decides on a part of a step
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-5)
    largest = max((weights[name] - tensor).abs().max().item() for name, tensor in expected.items())
    print(f"\n{launcher}, {num_processes} processes against one: weights differ by {largest:.1e} at most")
    if launcher == "ddp":
        assert {log["engine"] for log in logs} == {"DistributedDataParallel"}
        return logs
    assert {log["engine"] for log in logs} == {"DeepSpeedEngine"}
    if "partition" in logs[0]:
        assert {log["stage"] for log in logs} == {2}
        # Each process holds about its part of the trainable weights' optimizer state; the engine knows no other
        # weights
        shares = [log["partition"] / log["trainable"] * num_processes for log in logs]
        assert all(1.0 <= share < 1.02 for share in shares)
        print(f"partitions of {logs[0]['trainable']}: {[log['partition'] for log in logs]}")
    return logs


def assert_learned_alike(tmp_path, launcher, num_processes, **kwargs):
    """4 steps on the same stored rollouts."""
    run(tmp_path / "one", "one", "stored", **kwargs)
    run(tmp_path / "many", launcher, "stored", num_processes, **kwargs)
    return assert_alike(tmp_path / "one", tmp_path / "many", launcher, num_processes)


# The second of four rollouts has no reward. With one latent, which is not fed back, some weights have no use
SKIPPING = {"num_iterations": 1, "steps_without_rewards": [1], "policy_kwargs": {"num_latents": 1}}
SKIPPING["lr_scheduler_type"] = "constant"  # DeepSpeed's does not move on with a step that is skipped
# Stages of 1, 2 and 3 latents
SUPERVISED = {"projection_learning_rate": 2e-3, "mean_bound": 0.01}
TRAINED = {"policy_kwargs": {"injection": "trained"}}
CASES = {
    "dapo": ("stored", {"loss_type": "dapo", "projection_learning_rate": 2e-3}),
    "grpo": ("stored", {"loss_type": "grpo", "projection_learning_rate": 2e-3}),
    "hybrid": ("stored", {"hybrid_coef": 0.1, **TRAINED}),
    "skipping": ("stored", SKIPPING),
    "supervised": ("sft", SUPERVISED),
    "supervised_trained": ("sft", {**SUPERVISED, **TRAINED}),
}
# One group of 8 trajectories, of which each process holds half, and 2 of which are decoded, wherever they are
SCREENED = {"prescreening_fraction": 0.25, "prescreening_warmup_rollouts": 1, "num_iterations": 1}
CASES_OF_TWO = {
    "spanning": ("rollouts", {"exploration_check_prompts": 2, "own_weights": True}),
    "screened": ("rollouts", SCREENED),
    "soft_tokens": ("soft_tokens", {"beta": 0.04, "max_steps": 1}),
    # Answers of one token at most: groups are alike in one process, and not in the other
    "redrawn": ("soft_tokens", {"num_generations": 2, "max_completion_length": 1, "max_redraws": 4, "max_steps": 2}),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Folder with what one process has made of each case."""
    folder = tmp_path_factory.mktemp("one")
    launch(folder, "one", "several", 1, cases=CASES)
    return folder


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=needs_compiler)])
def test_two_processes_learn_what_one_does_and_share_their_groups(one_process, tmp_path, launcher):
    cases = {**CASES, **CASES_OF_TWO}
    launch(tmp_path, launcher, "several", cases=cases)
    for name in CASES:
        logs = assert_alike(one_process / name, tmp_path / name, launcher)
        (one,), _ = read(one_process / name, 1)
        if CASES[name][0] == "sft":
            assert logs[0]["loss"] == pytest.approx(one["loss"], rel=1e-4)
        else:
            assert logs[0]["skipped_steps"] == one["skipped_steps"]
    (skipping,), _ = read(one_process / "skipping", 1)
    assert skipping["processes"] == 1 and skipping["skipped_steps"] == [0.0, 1.0, 0.0, 0.0]

    logs, _ = read(tmp_path / "spanning")
    for key in ("reward", "frac_reward_mixed", "latent/kl", "latent/diversity"):  # statistics are of whole groups
        assert logs[0][key] == logs[1][key] != [], key
    assert logs[0]["latent/kl"][0] == 0.0  # the reference is the first process's policy, as the policy is
    logs, _ = read(tmp_path / "soft_tokens")
    assert logs[0]["kl"] == logs[1]["kl"] == [pytest.approx(0, abs=1e-6)]  # so is that of a model that thinks
    logs, _ = read(tmp_path / "redrawn")
    for key in ("redrawn_groups", "reward", "frac_reward_zero_std"):
        assert logs[0][key] == logs[1][key], key
    assert logs[0]["redrawn_groups"][0] > 0
    logs, weights = read(tmp_path / "screened")
    assert logs[0]["decoded"] + logs[1]["decoded"] == 8 + 3 * 2
    assert any(name.startswith("value_head.") for name in weights)  # `read` compares those of the two processes
    for key in ("reward", "prescreening/loss", "prescreening/reward_random", "completions/mean_length"):
        assert logs[0][key] == logs[1][key] != [], key
    assert logs[0]["main_model/decoded_fraction"] == [1.0, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=[needs_compiler, pytest.mark.slow])])
def test_a_model_that_thinks_learns_and_answers_on_two_processes_as_on_one(tmp_path, launcher):
    one, expected = run(tmp_path / "one", "one", "coconut")
    two, weights = run(tmp_path / "two", launcher, "coconut")
    assert {log["engine"] for log in two} == {"DeepSpeedEngine" if launcher == "zero2" else "DistributedDataParallel"}
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=1e-5)
    assert all(log["answers"] == one[0]["answers"] and log["accuracy"] == one[0]["accuracy"] for log in two)


@pytest.mark.parametrize(
    "launcher", [pytest.param("ddp", marks=pytest.mark.slow), pytest.param("zero2", marks=needs_compiler)]
)
def test_latent_rl_on_two_processes_is_that_on_one(tmp_path, launcher):
    # SGD: AdamW's first steps do not depend on the gradients' size
    kwargs = {"generation_kwargs": {"do_sample": False}, "optim": "sgd", "learning_rate": 0.1, "max_steps": 4}
    kwargs |= {"value_warmup_steps": 2}
    one, expected = run(tmp_path / "one", "one", "latent_rl", **kwargs)
    two, weights = run(tmp_path / "two", launcher, "latent_rl", **kwargs)
    assert {log["engine"] for log in two} == {"DeepSpeedEngine" if launcher == "zero2" else "DistributedDataParallel"}
    for key in ("value/auc", "value/accuracy"):
        assert two[0][key] == two[1][key] == pytest.approx(one[0][key]) != [], key
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=1e-5)
    start = random_main_model().state_dict()
    assert any((tensor - start[name]).abs().max() > 1e-4 for name, tensor in expected.items() if name in start)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=needs_compiler)])
def test_eight_processes_learn_what_one_does_from_the_same_rollouts(tmp_path, launcher):
    assert_learned_alike(tmp_path, launcher, 8, projection_learning_rate=2e-3, max_grad_norm=0.1)


@needs_compiler
def test_zero2_clips_and_skips_steps_as_one_process_does(tmp_path):
    # The second of four rollouts has no reward. SGD, since AdamW's steps do not depend on the gradients' size
    kwargs = {"num_iterations": 1, "steps_without_rewards": [1], "lr_scheduler_type": "constant"}
    kwargs |= {"max_grad_norm": 0.05, "optim": "sgd", "learning_rate": 0.1}
    logs = assert_learned_alike(tmp_path, "zero2", 2, **kwargs)
    one = json.loads((tmp_path / "one" / "run_0.json").read_text())
    assert logs[0]["skipped_steps"] == one["skipped_steps"] == [0.0, 1.0, 0.0, 0.0]
    for step in (0, 2, 3):  # the norm before clipping, far above the limit
        assert logs[0]["grad_norm"][step] == pytest.approx(one["grad_norm"][step], rel=1e-4)
        assert one["grad_norm"][step] > 0.2


@needs_compiler
def test_a_resumed_zero2_run_equals_the_uninterrupted_one(tmp_path):
    # In the middle of a rollout of the second epoch (2 questions are 4 steps), with a value head; weights in bfloat16,
    # of which each process keeps a float32 part
    kwargs = {"prescreening_fraction": 0.25, "prescreening_warmup_rollouts": 1, "projection_learning_rate": 2e-3}
    kwargs |= {"bf16": True, "save_strategy": "steps", "save_steps": 5, "max_steps": 10, "num_rows": 2}
    straight, expected = run(tmp_path / "straight", "zero2_bf16", "rollouts", **kwargs)
    checkpoint = str(tmp_path / "straight" / "run" / "checkpoint-5")
    resumed, weights = run(tmp_path / "resumed", "zero2_bf16", "rollouts", checkpoint=checkpoint, **kwargs)
    assert weights["latent_head.mean.weight"].dtype == torch.bfloat16
    assert straight[0]["latent/kl"][0] == 0.0  # the reference has been cast as well
    assert any(name.startswith("value_head.") for name in weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert [log["loss"] for log in resumed] == [log["loss"] for log in straight]


@needs_compiler
def test_a_launch_that_lost_its_deepspeed_is_refused(tmp_path):
    error = launch(tmp_path / "lost", "zero2", "rollouts", env={"ACCELERATE_USE_CPU": "true"}, fails=True)
    assert "ValueError: DeepSpeed is configured, but the environment has `ACCELERATE_USE_CPU`" in error
    assert not (tmp_path / "lost" / "run").exists()


@needs_compiler
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_another_stage_is_refused(monkeypatch, tmp_path, stage):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    with pytest.raises(ValueError, match=f"`zero_stage={stage}` is not supported.*Set `zero_stage: 2`"):
        make_trainer(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("by", ["argument", "environment"])
@pytest.mark.parametrize(
    "make", [make_trainer, make_sft_trainer, make_coconut_trainer, make_soft_token_trainer, make_latent_rl_trainer]
)
def test_fsdp_is_refused(monkeypatch, tmp_path, make, by):
    if by == "environment":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="^FSDP .* is not supported.*Use DDP, or DeepSpeed ZeRO-2"):
        make(tmp_path, **({"fsdp": True} if by == "argument" else {}))
    assert not (tmp_path / "run").exists()


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2}

# ---- Another number of processes, and nodes ----

REPARTITIONED = [
    pytest.param("ddp", 2, 1),
    pytest.param("ddp", 1, 2, marks=pytest.mark.slow),
    pytest.param("zero2", 2, 1, marks=[needs_compiler, pytest.mark.slow]),
    pytest.param("zero2", 1, 2, marks=needs_compiler),
]


@pytest.mark.parametrize(("launcher", "before", "after"), REPARTITIONED)
def test_a_run_goes_on_with_another_number_of_processes(one_process, tmp_path, launcher, before, after):
    mode, kwargs = CASES["skipping"]  # a rollout for every step
    kwargs = {**kwargs, "save_strategy": "steps", "save_steps": 2}
    launch(tmp_path / "before", launcher, mode, before, **kwargs)
    checkpoint = tmp_path / "before" / "run" / "checkpoint-2"
    files = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    kwargs["save_strategy"] = "no"  # and yet nothing is left of what was converted
    log = launch(tmp_path / "after", launcher, mode, after, checkpoint=str(checkpoint), **kwargs)
    assert f"checkpoint-2 was written by another number of processes, and there are {after} now" in log
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == files
    assert not (tmp_path / "after" / "run" / "_unfinished").exists()
    assert_alike(one_process / "skipping", tmp_path / "after", launcher, after)  # with AdamW's moments


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=[needs_compiler, pytest.mark.slow])])
def test_a_rollout_is_drawn_again_by_another_number_of_processes(tmp_path, launcher):
    kwargs = {"prescreening_fraction": 0.25, "prescreening_warmup_rollouts": 1, "num_iterations": 2}
    kwargs |= {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "num_rows": 3}  # in the second rollout
    launch(tmp_path, launcher, "rollouts", 2, **kwargs)
    launch(tmp_path, launcher, "rollouts", 1, checkpoint=str(tmp_path / "run" / "checkpoint-3"), **kwargs)
    (log,), weights = read(tmp_path, 1)
    assert log["decoded"] == 2 * 2  # this rollout and the next, screened: the first, whole, was that of the warm-up
    assert len(log["loss"]) == 5 and all(tensor.isfinite().all() for tensor in weights.values())


def test_rollouts_stay_in_step_where_an_epoch_ends_in_the_middle_of_an_accumulation(tmp_path):
    kwargs = {"num_rows": 3, "num_iterations": 3, "steps_per_generation": 1, "gradient_accumulation_steps": 2}
    kwargs |= {"save_strategy": "steps", "save_steps": 5, "max_steps": 9}
    straight, _ = run(tmp_path, "ddp", "rollouts", **kwargs)
    launch(tmp_path, "one", "rollouts", 1, checkpoint=str(tmp_path / "run" / "checkpoint-5"), **kwargs)
    (log,), _ = read(tmp_path, 1)
    assert log["micro_steps"] == straight[0]["micro_steps"] < 2 * 9


@needs_compiler
def test_the_best_policy_of_other_processes_comes_back(tmp_path):
    mode, kwargs = CASES["skipping"]
    kwargs = {**kwargs, "save_strategy": "steps", "save_steps": 2, "best_step": 2}
    launch(tmp_path, "zero2", mode, 2, **kwargs)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    launch(tmp_path, "zero2", mode, 1, checkpoint=True, **kwargs)
    _, weights = read(tmp_path, 1)
    best = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in best.items())


@pytest.mark.parametrize("shares", [{}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}])
def test_supervised_batches_are_in_order_for_another_number_of_processes(tmp_path, shares):
    kwargs = {"save_strategy": "steps", "save_steps": 4}  # in the second epoch of two
    _, expected = run(tmp_path / "straight", "one", "sft", **kwargs)
    launch(tmp_path / "two", "ddp", "sft", 2, **kwargs)
    checkpoint = str(tmp_path / "two" / "run" / "checkpoint-4")
    launch(tmp_path / "two", "ddp", "sft", 1, checkpoint=checkpoint, **kwargs, **shares)
    _, weights = read(tmp_path / "two", 1)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-5)


def test_a_batch_of_another_size_is_refused_whatever_the_processes(tmp_path):
    launch(tmp_path, "ddp", "stored", 2, save_strategy="steps", save_steps=2)
    error = launch(tmp_path, "ddp", "stored", 2, fails=True, checkpoint=True, gradient_accumulation_steps=2)
    assert "`gradient_accumulation_steps` was 1 in its run, and is 2 now." in error
    error = launch(tmp_path, "one", "stored", 1, fails=True, checkpoint=True, gradient_accumulation_steps=2)
    assert "`batch_size` was 8 in its run, and is 16 now." in error


NODES = {"num_nodes": 2, "local_disks": True, "save_on_each_node": True}


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=needs_compiler)])
def test_nodes_with_disks_of_their_own_resume(tmp_path, launcher):
    kwargs = {"prescreening_fraction": 0.25, "prescreening_warmup_rollouts": 1, "num_iterations": 2}
    kwargs |= {"save_strategy": "steps", "save_steps": 1, **NODES}
    launch(tmp_path, launcher, "rollouts", **kwargs)
    nodes = [tmp_path / f"node_{i}" for i in range(2)]
    expected = load_file(nodes[0] / "weights_0.safetensors")
    # One node was lost while it was saving what the other has saved
    shutil.rmtree(nodes[0] / "run" / "checkpoint-4")
    for name in ("checkpoint-4", "checkpoint-3"):
        shutil.rmtree(nodes[1] / "run" / name)
    for i, node in enumerate(nodes):
        assert LatentPolicyModel.from_pretrained(node / "run" / "checkpoint-2").config.latent_dim == 4
        (node / f"weights_{i}.safetensors").unlink()
    launch(tmp_path, launcher, "rollouts", checkpoint=True, **kwargs)
    for i, node in enumerate(nodes):
        assert sorted(path.name for path in (node / "run").glob("*_*")) == []
        weights = load_file(node / f"weights_{i}.safetensors")
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    record = nodes[1] / "run" / "checkpoint-4" / "checkpoint.json"
    whole = record.read_text()
    record.write_text(json.dumps({**json.loads(whole), "save": "of another run"}))
    shutil.rmtree(nodes[0] / "run" / "checkpoint-3")
    shutil.rmtree(nodes[0] / "run" / "checkpoint-2")
    shutil.rmtree(nodes[0] / "run" / "checkpoint-1")
    error = launch(tmp_path, launcher, "rollouts", checkpoint=True, fails=True, **kwargs)
    assert "has no checkpoint that all processes have" in error
    record.write_text(whole)
    nodes[0].rename(tmp_path / "other")
    nodes[1].rename(nodes[0])
    (tmp_path / "other").rename(nodes[1])
    error = launch(tmp_path, launcher, "rollouts", checkpoint=True, fails=True, **kwargs)
    assert (
        "_0" in error and "which is on the disk of another node. Start the nodes in the order that they had" in error
    )


def test_nodes_that_do_not_share_what_they_should_are_refused(tmp_path):
    error = launch(tmp_path, "ddp", "rollouts", fails=True, num_nodes=2, local_disks=True)
    assert "run` is not one folder for all processes: process 1 does not see what process 0 writes there" in error
    error = launch(tmp_path, "ddp", "rollouts", fails=True, num_nodes=2, save_on_each_node=True)
    assert "`save_on_each_node=True`, but processes [0, 1] write to the same `output_dir=" in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name == "run"]


def start_nodes(folder, launcher, **kwargs):
    """A launcher for each of two nodes, with one process each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, env = [], {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for rank in range(2):
        if launcher == "ddp":
            env["ACCELERATE_USE_CPU"] = "true"
            options = f"torch.distributed.run --nnodes 2 --node_rank {rank} --nproc_per_node 1 --master_addr 127.0.0.1"
            options += f" --master_port {port}"
        else:
            options = f"accelerate.commands.launch --config_file {ZERO2} --num_machines 2 --machine_rank {rank}"
            options += f" --num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {port}"
        command = [sys.executable, "-m", *options.split(), *program(folder, "rollouts", 2, **kwargs)]
        output = folder / f"node_{rank}.txt"
        with open(output, "w") as stderr:
            processes.append(
                subprocess.Popen(
                    command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
                )
            )
    return processes


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=[needs_compiler, pytest.mark.slow])])
def test_a_lost_node_ends_the_job_and_both_resume(tmp_path, launcher):
    kwargs = {"local_disks": True, "save_on_each_node": True, **EVERY_STEP, "max_steps": 6}
    launch(tmp_path / "straight", launcher, "rollouts", **{**kwargs, "num_nodes": 2})
    expected = load_file(tmp_path / "straight" / "node_0" / "weights_0.safetensors")
    stalled = {"rank": 1, "step": 4, "how": "SIGSTOP"}  # in the third rollout
    first, second = start_nodes(tmp_path, launcher, **kwargs, failure=stalled)
    pid = int(wait_for(tmp_path / "node_1" / "started_1").read_text())
    while status_of(pid, "State")[0] != "T":
        assert second.poll() is None, (tmp_path / "node_1.txt").read_text()[-4000:]
        time.sleep(0.05)
    os.killpg(second.pid, signal.SIGKILL)  # the launcher, and then its process
    os.kill(pid, signal.SIGKILL)
    assert first.wait(120) == 1
    error = (tmp_path / "node_0.txt").read_text()
    assert "Process 0 of 2 ends after step 4 with " in error and "another process or its node was gone before" in error
    assert "checkpoint-4; `resume_from_checkpoint=True` goes on from the last that all processes have" in error
    for process in start_nodes(tmp_path, launcher, **kwargs, checkpoint=True):
        assert process.wait(300) == 0
    for rank in range(2):
        weights = load_file(tmp_path / f"node_{rank}" / f"weights_{rank}.safetensors")
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


# ---- Faults of several processes ----


@needs_compiler
@pytest.mark.parametrize(
    ("how", "rank"),
    [
        ("SIGKILL", 0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("raise", 1), ("raise", 0), ("SIGKILL", 1)]),
    ],
)
def test_a_process_that_fails_ends_the_job(tmp_path, how, rank):
    failure = {"rank": rank, "step": 2, "how": how}
    folder = tmp_path / "failing"
    status, error = finish(start(folder, "rollouts", failure=failure, **EVERY_STEP), folder)
    assert status != 0 and not (folder / "run" / "model.safetensors").exists()
    if how == "raise":
        first = next(line for line in error.splitlines() if "Error:" in line)
        assert f"ZeroDivisionError: process {rank} has failed" in first  # before what its end did to the other
    else:
        assert "Signal 9 (SIGKILL)" in error
    assert sorted(path.name for path in (folder / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    for i in range(2):  # nothing is left running
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / f"started_{i}").read_text()), 0)


@needs_compiler
@pytest.mark.parametrize("receiver", ["launcher", pytest.param("one process", marks=pytest.mark.slow)])
def test_a_preempted_job_saves_exits_and_resumes(tmp_path, receiver):
    kwargs = {"num_iterations": 2}
    _, expected = run(tmp_path / "straight", "zero2", "rollouts", **kwargs)
    folder = tmp_path / "preempted"
    if receiver == "launcher":
        process = start(folder, "rollouts", **kwargs, failure={"rank": 0, "step": 2, "how": "SIGSTOP"})
        pid = int(wait_for(folder / "started_0").read_text())
        while status_of(pid, "State")[0] != "T":
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # while one process is in a rollout, and the other waits for it
        while not int(status_of(pid, "ShdPnd"), 16) >> (signal.SIGTERM - 1) & 1:  # until it has been passed on
            time.sleep(0.05)
        os.kill(pid, signal.SIGCONT)
        status, error = finish(process, folder)
    else:
        failure = {"rank": 1, "step": 2, "how": "SIGTERM"}
        status, error = finish(start(folder, "rollouts", **kwargs, failure=failure), folder)
    assert status != 0
    assert "SIGTERM: stopped after step 3 of 4; saved " in error
    assert [path.name for path in (folder / "run").iterdir() if path.is_dir()] == ["checkpoint-3"]
    assert not list(folder.glob("weights_*"))
    _, weights = run(folder, "zero2", "rollouts", checkpoint=True, **kwargs)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def status_of(pid, name):
    """A field of /proc/<pid>/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(f"{name}:"))


def wait_for(path, seconds=600):
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)
    return path


@needs_compiler
@pytest.mark.slow
def test_a_zero2_run_killed_at_50_random_moments_resumes_each_time(tmp_path):
    kwargs = {**EVERY_STEP, "max_steps": 1500, "save_total_limit": 2}
    kwargs |= {"prescreening_fraction": 0.25, "prescreening_warmup_rollouts": 1}
    _, expected = run(tmp_path / "straight", "zero2", "rollouts", **kwargs)
    folder, moments = tmp_path / "killed", random.Random(0)
    steps, in_saves = [], 0
    for _ in range(50):
        for rank in range(2):
            (folder / f"started_{rank}").unlink(missing_ok=True)
        process = start(folder, "rollouts", checkpoint=bool(steps and steps[-1]), **kwargs)
        pids = [int(wait_for(folder / f"started_{rank}").read_text()) for rank in range(2)]
        time.sleep(moments.uniform(0.0, 3.0))
        for pid in (process.pid, *pids):
            os.kill(pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (folder / "stderr.txt").read_text()[-4000:]
        checkpoints = [int(path.name.split("-")[1]) for path in (folder / "run").glob("checkpoint-*")]
        steps.append(max(checkpoints, default=0))
        in_saves += (folder / "run" / "_unfinished").exists()
    print(f"\n50 kills, {in_saves} of them in a save; the last checkpoints were of the steps {steps}")
    assert steps == sorted(steps) and steps[-1] < kwargs["max_steps"]
    _, weights = run(folder, "zero2", "rollouts", checkpoint=True, **kwargs)
    assert any(name.startswith("value_head.") for name in weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
