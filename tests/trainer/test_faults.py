# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What can happen to a run and to its checkpoints, made to happen. Several processes: test_distributed.py."""

import itertools
import json
import shutil
import signal

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer

from tests.tiny import random_main_model, tiny_dataset, tiny_tokenizer
from tests.trainer.fault_worker import SETTINGS, finish, start
from tests.trainer.test_latent_grpo_trainer import length_reward, make_policy, make_trainer
from tests.trainer.test_latent_sft_trainer import make_sft_trainer
from trl_dlr import LatentPolicyModel


def checkpoints(folder):
    return sorted(path.name for path in (folder / "run").iterdir() if path.is_dir())


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_end(folder, straight):
    expected, found = load_file(straight / "weights.safetensors"), load_file(folder / "weights.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    assert finish(start(folder)) == 0
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    return folder


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_in_a_save_resumes_from_the_last_whole_checkpoint(tmp_path, straight, every):
    survived = 0
    for place in itertools.count(1, every):
        folder = tmp_path / str(place)
        process = start(folder, fault="kill_in_save", fault_args=(4, place, folder / "events.txt"))
        status = finish(process)
        if status == 0:  # fewer events than this
            break
        assert status == -signal.SIGKILL
        left = checkpoints(folder)
        assert set(left) - {"_unfinished"} in ({"checkpoint-2"}, {"checkpoint-2", "checkpoint-4"})
        assert finish(start(folder, resume=True)) == 0
        assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        assert_same_end(folder, straight)
        survived += 1
        shutil.rmtree(folder)
    print(f"\nkilled in a save and resumed: {survived}")
    assert survived * every > 20


IN_A_STEP = [
    *itertools.product(["_generate_single_turn", "_calculate_rewards"], [0, 4]),  # the steps with a rollout
    *itertools.product(["_compute_loss", "_finish_step", "optimizer"], [1, 4, 5]),
]


@pytest.mark.parametrize(("place", "step"), IN_A_STEP)
def test_a_run_killed_in_the_middle_of_a_step_resumes(tmp_path, straight, place, step):
    assert finish(start(tmp_path, fault="kill_in_step", fault_args=(step, place))) == -signal.SIGKILL
    assert finish(start(tmp_path, resume=step >= 2)) == 0
    assert_same_end(tmp_path, straight)


def test_sigterm_saves_and_exits_and_the_run_resumes(tmp_path, straight):
    assert finish(start(tmp_path, fault="signal_in_step", fault_args=(2, signal.SIGTERM))) == 143
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]  # the step ended
    assert "SIGTERM: stopped after step 3 of 6; saved " in (tmp_path / "stderr.txt").read_text()
    assert not (tmp_path / "weights.safetensors").exists()
    assert finish(start(tmp_path, resume=True)) == 0
    assert_same_end(tmp_path, straight)


def test_sigterm_saves_where_nothing_else_would(tmp_path, straight):
    kwargs = {"save_strategy": "no"}
    assert finish(start(tmp_path, fault="signal_in_step", fault_args=(4, signal.SIGTERM), **kwargs)) == 143
    assert checkpoints(tmp_path) == ["checkpoint-5"]
    assert finish(start(tmp_path, resume=True, **kwargs)) == 0
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize("size", [0, 1_000, 30_000, 100_000, 250_000])
def test_a_full_disk_is_one_clear_error_and_leaves_what_was_there(tmp_path, straight, size):
    status = finish(start(tmp_path, fault="fill_disk", fault_args=(4, size)))
    error = (tmp_path / "stderr.txt").read_text().splitlines()[-1]
    assert status == 1
    assert "RuntimeError: The checkpoint of step 4 could not be written to" in error and "make room" in error
    assert checkpoints(tmp_path) == ["checkpoint-2"]  # and nothing unfinished
    assert finish(start(tmp_path, resume=True)) == 0
    assert_same_end(tmp_path, straight)


# ---- Checkpoints that cannot be resumed from: each is refused before anything is loaded, and left alone ----


def refused(folder, checkpoint, match, **kwargs):
    """Resuming raises, names what is wrong, and changes no file of the run."""
    before = contents(folder / "run")
    trainer = make_trainer(folder, **{**SETTINGS, **kwargs})
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert contents(folder / "run") == before


@pytest.fixture
def saved(tmp_path, straight):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    return tmp_path


def files_of(checkpoint):
    return sorted(json.loads((checkpoint / "checkpoint.json").read_text())["files"])


@pytest.mark.parametrize("damage", ["truncated", "missing", "longer"])
def test_a_checkpoint_with_a_damaged_file_is_refused(saved, damage):
    checkpoint = saved / "run" / "checkpoint-6"
    names = files_of(checkpoint)
    assert {"model.safetensors", "optimizer.pt", "extra_state_0.safetensors", "trainer_state.json"} < set(names)
    for name in names:
        path = checkpoint / name
        whole = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else whole + b"0")
        found = {
            "missing": "is missing",
            "truncated": f"has {len(whole) // 2} bytes",
            "longer": f"has {len(whole) + 1} bytes",
        }[damage]
        match = (
            f"checkpoint-6` is damaged: `{name}` {found}.*{len(whole)} bytes. Copy it again, or resume from an earlier"
        )
        refused(saved, True, match)
        path.write_bytes(whole)
    print(f"\n{damage}: {len(names)} files")
    shutil.rmtree(checkpoint)  # the earlier one
    assert finish(start(saved, resume=True)) == 0
    assert_same_end(saved, saved)


@pytest.mark.parametrize("record", [None, "", "{}", "[]", "{", "\x00", '{"files": {}}'])
def test_a_checkpoint_without_its_record_is_refused(saved, record):
    path = saved / "run" / "checkpoint-6" / "checkpoint.json"
    path.unlink()
    if record is not None:
        path.write_text(record)
    refused(saved, True, "checkpoint-6` is no whole checkpoint of this trainer: its `checkpoint.json` cannot be read")


def test_the_last_checkpoint_is_one_of_that_name(saved):
    for name in ("checkpoint-8.broken", "old-checkpoint-9", "checkpoint-last"):
        (saved / "run" / name).mkdir()
    assert make_trainer(saved, **SETTINGS).checkpoint_to_resume(True) == str(saved / "run" / "checkpoint-6")


def test_a_path_is_the_checkpoint_that_it_names(saved):
    trainer = make_trainer(saved, **SETTINGS)
    trainer.args.max_steps = 3
    assert trainer.train(resume_from_checkpoint=saved / "run" / "checkpoint-2").global_step == 3


@pytest.mark.parametrize("value", [1, 0, ["checkpoint-6"]])
def test_what_names_no_checkpoint_is_refused(saved, value):
    refused(saved, value, r"`resume_from_checkpoint` must be the folder of a checkpoint, or `True`.*got ")


def test_a_folder_that_is_no_checkpoint_is_refused(saved, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    refused(saved, str(other / "absent"), "is no whole checkpoint of this trainer.*FileNotFoundError")
    refused(saved, other, "is no whole checkpoint of this trainer.*FileNotFoundError")
    make_policy(random_main_model()).save_pretrained(other / "policy")
    refused(saved, str(other / "policy"), "is no whole checkpoint of this trainer.*pass a policy alone as `model`")
    trainer = make_trainer(other, **SETTINGS)
    with pytest.raises(ValueError, match="`resume_from_checkpoint=True`, but `output_dir=.*run` has no checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_trls_trainer_is_refused(saved, tmp_path_factory):
    other = tmp_path_factory.mktemp("trl")
    args = {"max_steps": 1, "save_steps": 1, "num_generations": 2, "per_device_train_batch_size": 2}
    GRPOTrainer(
        model=random_main_model(),
        reward_funcs=length_reward,
        args=GRPOConfig(str(other), **args, max_completion_length=2, bf16=False, use_cpu=True, report_to="none"),
        train_dataset=tiny_dataset(4, 0),
        processing_class=tiny_tokenizer(),
    ).train()
    assert (other / "checkpoint-1" / "model.safetensors").is_file()
    refused(saved, str(other / "checkpoint-1"), "is no whole checkpoint of this trainer")


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"policy_kwargs": {"learn_sigma": True, "latent_dim": 8}}, r"`latent_dim` was 4 in its policy, and is 8"),
        (
            {"policy_kwargs": {"learn_sigma": True, "num_latents": 2}},
            "`num_latents` was 3 in its policy, and is 2 now",
        ),
        (
            {"policy_kwargs": {"learn_sigma": True, "latent_sampling": "parallel"}},
            "`latent_sampling` was autoregressive in its pol",
        ),
        ({"policy_kwargs": {}}, "`learn_sigma` was True in its policy"),
        ({"trainer_kwargs": {"peft_config": LoraConfig(r=2)}}, "`adapter` was False in its run"),
        ({"prescreening_fraction": 1.0}, "`prescreening` was True in its run, and is False now"),
        ({"num_iterations": 2}, "`num_iterations` was 4 in its run, and is 2 now. Resume it as it was, or start anew"),
        ({"num_generations": 4}, "`num_generations` was 8"),
        ({"per_device_train_batch_size": 16}, "`per_device_train_batch_size` was 8"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` was 1"),
    ],
)
def test_a_checkpoint_of_a_run_that_differs_is_refused(saved, kwargs, match):
    refused(saved, str(saved / "run" / "checkpoint-4"), match, **kwargs)


def test_a_checkpoint_of_a_supervised_start_is_refused(saved, tmp_path_factory):
    other = tmp_path_factory.mktemp("sft")
    policy = make_policy(random_main_model(), **SETTINGS["policy_kwargs"])
    make_sft_trainer(other, model=policy, save_strategy="steps", save_steps=4).train()
    match = "`trainer` was LatentSFTTrainer in its run, and is LatentGRPOTrainer now"
    refused(saved, str(other / "run" / "checkpoint-4"), match)


def test_a_checkpoint_for_another_main_model_is_refused(saved):
    other = {"main_model": random_main_model(seed=1)}
    refused(saved, True, "belongs to a main model with fingerprint .*, and `main_model` has .*_mismatch=True", **other)
    trainer = make_trainer(saved, **{**SETTINGS, "max_steps": 7}, **other, allow_main_model_mismatch=True)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 7


def test_a_checkpoint_without_an_optimizer_is_refused(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True).train()
    trainer = make_trainer(tmp_path, max_steps=4)
    with pytest.raises(ValueError, match="checkpoint-2` was saved with `save_only_model=True`"):
        trainer.train(resume_from_checkpoint=True)


# ---- What else a checkpoint has to do ----


def test_limits_and_the_best_checkpoint_are_kept(tmp_path):
    trainer = make_trainer(
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="reward",
        trainer_kwargs={"eval_dataset": tiny_dataset(4, 1)},
    )
    rewards = {2: 1.0, 4: 5.0, 6: 2.0, 8: 3.0}
    trainer.evaluate = lambda **kwargs: {"eval_reward": rewards[trainer.state.global_step]}
    trainer.train()
    best = str(tmp_path / "run" / "checkpoint-4")
    assert trainer.state.best_model_checkpoint == best
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    state = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


def test_a_checkpoint_replaces_one_of_the_same_step(tmp_path, straight):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    stale = tmp_path / "run" / "checkpoint-6" / "stale.txt"
    stale.write_text("of a run before")
    assert finish(start(tmp_path, resume=str(tmp_path / "run" / "checkpoint-4"))) == 0
    assert not stale.exists()
    assert_same_end(tmp_path, straight)


def test_saving_the_policy_puts_whole_files_in_place_or_none(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SETTINGS)
    folder = tmp_path / "policy"
    trainer.save_model(folder)
    before = contents(folder)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.prescreener, "save_head", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model(folder)
    assert contents(folder) == before
    LatentPolicyModel.from_pretrained(folder)
