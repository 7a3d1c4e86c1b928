# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
The memory plan against real runs, each in fresh processes: bytes of what is trained, and peaks of resident memory.
"""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.launch import Job
from tests.memory_worker import GradientRecorder, exact_bytes
from tests.tiny import random_main_model
from tests.trainer.test_latent_grpo_trainer import make_policy, make_trainer
from trl_dlr import LatentGRPOConfig, LatentPolicyModel
from trl_dlr.memory_plan import plan_memory, zero2_partitions
from trl_dlr.trainer.policy_training import adapter_for_policy


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles an extension with g++")
SIZES = {"num_hidden_layers": 4, "vocab_size": 8192, "max_position_embeddings": 512}
MAIN = {**SIZES, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12}
ASSISTANT = {**SIZES, "hidden_size": 512, "intermediate_size": 1408}
ASSISTANT |= {"num_attention_heads": 8, "num_key_value_heads": 8}
POLICY = {"latent_dim": 16, "num_latents": 8, "injection": "components"}
ARGS = {"per_device_train_batch_size": 16, "num_generations": 8, "max_completion_length": 16}
POINT = {"main": MAIN, "assistant": ASSISTANT, "policy": POLICY, "args": {}, "dtype": "bfloat16", "prompt_length": 32}
SMALL_MAIN = {**MAIN, "num_hidden_layers": 1}
LONG = {"per_device_train_batch_size": 48, "num_generations": 16, "max_completion_length": 32}
CACHED = {"dtype": "float32", "prompt_length": 64, "assistant": {**ASSISTANT, "num_hidden_layers": 1}}
MANY = {"main": SMALL_MAIN, "prompt_length": 64}
MANY_ROWS = {"per_device_train_batch_size": 64}
SCREENED = {**LONG, "prescreening_fraction": 0.25, "beta": 0.1}
FROZEN = {**POLICY, "freeze_embeddings": True}
# Name, launcher, which peak is the larger, and what differs from `POINT` and `ARGS`
POINTS = [
    ("float32", "one", "update", {"dtype": "float32"}),
    ("KV cache, pre-screening", "one", "rollout", {**CACHED, "args": SCREENED}),
]
SLOW_POINTS = [
    ("ZeRO-2, frozen embeddings, beta", "zero2", "update", {"policy": FROZEN, "args": {"beta": 0.1, "gamma": 0.1}}),
    ("64 rows", "one", "update", {**MANY, "args": MANY_ROWS}),
    (
        "64 rows, parallel",
        "one",
        "update",
        {**MANY, "args": MANY_ROWS, "policy": {**POLICY, "latent_sampling": "parallel"}},
    ),
    ("64 rows, bf16 autocast", "one", "update", {**MANY, "args": {**MANY_ROWS, "bf16": True}}),
    ("64 rows, checkpointing", "one", "update", {**MANY, "args": {**MANY_ROWS, "gradient_checkpointing": True}}),
    ("accumulation", "one", "update", {"args": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}}),
    ("beta, gamma", "one", "update", {"args": {"beta": 0.1, "gamma": 0.1}}),
    ("bounded decoding", "one", "update", {"prompt_length": 64, "args": {**SCREENED, "decoding_batch_size": 32}}),
    ("no warm-up", "one", "update", {"prompt_length": 64, "args": {**SCREENED, "prescreening_warmup_rollouts": 0}}),
    ("exploration check", "one", "rollout", {"prompt_length": 128, "args": {"exploration_check_prompts": 16}}),
    ("DDP, beta", "ddp", "update", {"args": {"beta": 0.1}}),
    ("DDP, KV cache", "ddp", "rollout", {**CACHED, "args": LONG}),
    ("ZeRO-2, 64 rows", "zero2", "update", {**MANY, "args": MANY_ROWS}),
    ("ZeRO-2, accumulation", "zero2", "update", {"args": {"gradient_accumulation_steps": 2}}),
    ("ZeRO-2, KV cache", "zero2", "rollout", {**CACHED, "args": LONG}),
    (
        "ZeRO-2 in bf16, two learning rates",
        "zero2_bf16",
        "update",
        {"args": {"bf16": True, "beta": 0.1, "projection_learning_rate": 1e-3}},
    ),
]


def marked(point, *marks):
    return pytest.param(*point, id=point[0], marks=[*marks, *([needs_compiler] if "zero2" in point[1] else [])])


@pytest.mark.parametrize(
    ("name", "launcher", "peak", "changes"),
    [*map(marked, POINTS), *(marked(point, pytest.mark.slow) for point in SLOW_POINTS)],
)
def test_the_plan_is_what_a_run_takes(tmp_path, name, launcher, peak, changes):
    point = {**POINT, **changes, "args": {**ARGS, **changes.get("args", {})}}
    program = ["-m", "tests.memory_worker", tmp_path, json.dumps(point)]
    result = Job(program, tmp_path, launcher, 1 if launcher == "one" else 2).wait()
    assert result.returncode == 0, result.stderr[-4000:]
    runs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("memory_*.json"))]
    engine = {"one": "LatentPolicyModel", "ddp": "DistributedDataParallel"}.get(launcher, "DeepSpeedEngine")
    assert [run["measured"]["engine"] for run in runs] == [engine] * (1 if launcher == "one" else 2)

    planned = runs[0]["planned"]
    for run in runs:
        for part in ("parameters", "optimizer_states"):
            assert run["measured"][part] == planned[part], part
    # Under ZeRO-2 a tensor on the border of two partitions is kept whole by both: one process holds most
    assert max(run["measured"]["gradients"] for run in runs) == planned["gradients"]
    assert planned["total"] == planned[f"{peak}_peak"]
    measured = max(run["measured"]["total"] for run in runs)
    ratio = planned["total"] / measured
    sizes = [value / 2**20 for value in (planned["rollout_peak"], planned["update_peak"], measured)]
    print(f"\n| {name} | {sizes[0]:.0f} | {sizes[1]:.0f} | {sizes[2]:.0f} | {ratio:.2f} |")
    assert 0.8 <= ratio <= 1.2


@pytest.mark.parametrize(
    ("policy_kwargs", "peft_config"),
    [
        ({"learn_sigma": True}, None),
        ({"state_sigma": True}, None),
        ({"latent_sampling": "parallel", "injection": "trained"}, None),
        ({"freeze_embeddings": True}, None),
        ({}, LoraConfig(r=2)),
    ],
    ids=["learned sigma", "sigma of the state", "parallel, trained injection", "frozen embeddings", "LoRA"],
)
def test_what_is_trained_is_exact_to_the_byte(tmp_path, policy_kwargs, peft_config):
    recorder = GradientRecorder()
    trainer_kwargs = {"callbacks": [recorder], "peft_config": peft_config}
    trainer = make_trainer(tmp_path, policy_kwargs=policy_kwargs, trainer_kwargs=trainer_kwargs, max_steps=1, beta=0.1)
    policy = make_policy(trainer.main_model, **policy_kwargs)
    if peft_config is not None:
        policy = get_peft_model(policy, adapter_for_policy(policy, peft_config))
    plan = plan_memory(policy, trainer.main_model, trainer.args, prompt_length=3)
    trainer.train()
    assert exact_bytes(trainer, recorder) == {
        name: getattr(plan, name) for name in ("parameters", "gradients", "optimizer_states")
    }
    assert plan.reference == (plan.parameters if peft_config is None else 0)


def small_plan(prompt_length=5, main_model_kwargs=None, plan_kwargs=None, **kwargs):
    main_model = random_main_model(**(main_model_kwargs or {}))
    defaults = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6}
    defaults |= {"num_latents": 3, "exploration_check_prompts": 0, "bf16": False, "use_cpu": True}
    args = LatentGRPOConfig("unused", **{**defaults, **kwargs})
    plan_kwargs = {"prompt_length": prompt_length, "on_gpu": False, **(plan_kwargs or {})}
    return plan_memory(make_policy(main_model), main_model, args, **plan_kwargs)


def test_the_kv_cache_is_that_of_what_is_decoded_together():
    per_token = 2 * 2 * 64 * 4  # keys and values, 2 layers, float32
    length = 5 + 3 + 6 - 1  # the last token is never fed
    assert small_plan().kv_cache == 8 * length * per_token
    assert small_plan(decoding_batch_size=3).kv_cache == 3 * length * per_token
    screened = {"prescreening_fraction": 0.5}
    assert small_plan(**screened).kv_cache == 8 * length * per_token  # while warming up
    assert small_plan(**screened, prescreening_warmup_rollouts=0).kv_cache == 4 * length * per_token
    assert small_plan(exploration_check_prompts=16).kv_cache == 64 * length * per_token
    assert small_plan(main_model_kwargs={"num_key_value_heads": 2}).kv_cache == 4 * length * per_token


def test_a_gpu_keeps_the_cache_that_it_decodes_with():
    per_token = 2 * 2 * 64 * 4
    plain, on_gpu = (small_plan(plan_kwargs={"on_gpu": value}) for value in (False, True))
    assert on_gpu.kv_cache == 8 * 64 * per_token  # of 14 tokens, rounded up
    assert on_gpu.update_peak - plain.update_peak == on_gpu.kv_cache
    sampled = small_plan(generation_kwargs={"do_sample": True}, plan_kwargs={"on_gpu": True})
    assert sampled == plain  # `generate` keeps none
    checked = {"exploration_check_prompts": 16, "plan_kwargs": {"on_gpu": True}}
    assert small_plan(**checked).kv_cache == 64 * 64 * per_token  # which makes room for that of training
    assert small_plan(**checked).update_peak == on_gpu.update_peak


def test_the_models_may_be_shapes_alone():
    args = LatentGRPOConfig("unused", bf16=False, use_cpu=True, latent_dim=4, num_latents=3, injection="components")
    main_model = random_main_model()
    policy = make_policy(main_model)
    with torch.device("meta"):
        shapes = LatentPolicyModel(policy.config), type(main_model)(main_model.config)
    assert plan_memory(*shapes, args, prompt_length=5) == plan_memory(policy, main_model, args, prompt_length=5)


def test_a_learned_stop_is_planned_with_all_its_steps():
    main_model = random_main_model()
    args = LatentGRPOConfig("unused", bf16=False, use_cpu=True, max_completion_length=6, beta=0.1)
    sizes = {"latent_dim": 4, "num_latents": 3, "injection": "components"}
    plain, stopping = (
        plan_memory(make_policy(main_model, **sizes, learn_stop=learn_stop), main_model, args, prompt_length=5)
        for learn_stop in (False, True)
    )
    assert stopping.parameters - plain.parameters == 4 * (64 + 1)
    assert stopping.kv_cache == plain.kv_cache


def test_partitions_are_alike_and_even():
    # 17 elements on 4 processes: 6 each, which is 7 more; the second one holds all of the 9 and the 3
    assert zero2_partitions([[5, 9, 3]], 4) == ([6], 14)


def test_a_quantized_main_model_is_smaller_and_a_reference_larger():
    plain = small_plan()
    eight, four = (small_plan(plan_kwargs={"main_model_bits": bits}) for bits in (8, 4))
    assert four.main_model < eight.main_model < plain.main_model
    assert small_plan(beta=0.1).total - plain.total >= plain.parameters


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"plan_kwargs": {"zero_stage": 3}}, "`zero_stage` must be one of 0, 2 to be planned, got 3"),
        ({"plan_kwargs": {"main_model_bits": 2}}, "`main_model_bits` must be one of None, 4, 8 to be planned, got 2"),
        ({"plan_kwargs": {"num_processes": 0}}, "`num_processes` must be at least 1, got 0"),
        ({"prompt_length": 0}, "`prompt_length` must be at least 1, got 0"),
        ({"optim": "sgd"}, "`args.optim` must be one of adamw_torch, adamw_torch_fused to be planned, got 'sgd'"),
        ({"hybrid_coef": 0.1}, "`hybrid_coef=0.1` passes gradients through the main model.*not planned"),
        ({"use_vllm": True}, "Plan with `use_vllm=False`"),
    ],
)
def test_what_cannot_be_planned_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_plan(**kwargs)
