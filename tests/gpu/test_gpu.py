# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A GPU beside the CPU of the same machine, and what only a GPU has: `make test-gpu`."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from tests.generation.test_graphed_decoding import plain_and_graphed
from tests.generation.test_transformers_engine import (
    PROMPTS,
    absolute_position_main_model,
    ids_of,
    often_ending_main_model,
)
from tests.launch import ROOT
from tests.tiny import random_main_model, tiny_dataset, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import history, make_policy, make_trainer, weights
from tests.trainer.test_prescreening import make_screened
from trl_dlr import LatentPolicyModel, LatentReasoner, first_layers
from trl_dlr.generation import create_engine, tokenize_prompts
from trl_dlr.scripts.utils import find_smollm2


pytestmark = pytest.mark.gpu


def on_gpu(tmp_path, **kwargs):
    return make_trainer(tmp_path, **{"use_cpu": False, **kwargs})


@pytest.fixture(scope="module")
def smollm2():
    name = find_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval(), tokenizer


# ---- The same as on a CPU, in float32 ----


@torch.no_grad()
def test_greedy_tokens_are_those_of_a_cpu(smollm2):
    main_model, tokenizer = smollm2
    prompts = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in ((3, 4), (12, 31), (123, 4), (7, 70))]
    prompt_ids = tokenize_prompts(prompts, tokenizer)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(main_model.config.vocab_size, (16, 4), generator=generator)
    latent_embeds = main_model.get_input_embeddings()(ids)
    latent_embeds = latent_embeds + 0.1 * torch.randn(latent_embeds.shape, generator=generator)
    counts, lengths = torch.tensor([4, 5, 1, 6]), torch.randint(1, 5, (16,), generator=generator)
    decoded = {}
    for device in ("cpu", "cuda"):
        engine = create_engine("transformers", copy.deepcopy(main_model).to(device), tokenizer, 24)
        decoded[device] = engine.generate(prompt_ids, latent_embeds.to(device), counts, lengths)
    assert len(set(map(tuple, decoded["cpu"]))) > 4
    assert decoded["cuda"] == decoded["cpu"]


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("make_main_model", [random_main_model, often_ending_main_model, absolute_position_main_model])
def test_a_graph_gives_the_tokens_of_generate(monkeypatch, make_main_model, batch_size):
    latent_embeds = 2 * torch.randn(9, 4, 64, generator=torch.Generator().manual_seed(1)).cuda()
    num_samples, num_latents = torch.tensor([3, 2, 4]), torch.tensor([4, 1, 2, 3, 1, 1, 2, 3, 4])
    rows = ids_of(PROMPTS), latent_embeds, num_samples, num_latents
    options = {"max_new_tokens": 30, "generation_kwargs": {"min_new_tokens": 6}, "batch_size": batch_size}
    expected, decoded = plain_and_graphed(monkeypatch, make_main_model().cuda(), *rows, **options)
    assert decoded == expected


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_densities_and_gradients_are_those_of_a_cpu(smollm2, sampling):
    main_model, tokenizer = smollm2
    config = {"latent_dim": 16, "num_latents": 4, "latent_sampling": sampling, "injection": "components"}
    policy = LatentPolicyModel.from_assistant(first_layers(main_model, 2), main_model, tokenizer, **config)
    ids = torch.randint(100, 1000, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    latents = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
    results = {}
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(policy).to(device)
        output = own(input_ids=ids.to(device), attention_mask=mask.to(device), latents=latents.to(device))
        log_probs = output.density.log_prob(latents.to(device))
        log_probs.sum().backward()
        results[device] = {
            "log_probs": log_probs.detach(),
            "embeddings": own.inject(latents.to(device)).detach(),
            **{name: weight.grad for name, weight in own.named_parameters() if weight.grad is not None},
        }
    assert results["cpu"].keys() == results["cuda"].keys()
    for name, value in results["cpu"].items():
        error = (results["cuda"][name].cpu() - value).norm() / value.norm()
        assert error < 1e-4, (name, error)


def test_a_run_is_repeated_and_a_main_model_stays_as_it_is(tmp_path):
    runs = []
    for name in "ab":
        trainer = on_gpu(tmp_path / name, prescreening_fraction=0.5, beta=0.1, gamma=0.1)
        before = weights(trainer.main_model)
        trainer.train()
        assert trainer.main_model.device.type == trainer.model.device.type == "cuda"
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer.main_model).items())
        runs.append((history(trainer, "reward"), weights(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())


# ---- Precisions ----


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_gives_a_ratio_of_exactly_one_and_learns(tmp_path, precision, sampling):
    trainer = on_gpu(
        tmp_path,
        **{"bf16": False, precision: True},
        policy_kwargs={"latent_sampling": sampling},
        num_iterations=1,
        beta=0.1,
        gamma=0.1,
    )
    before = weights(trainer.model)
    trainer.train()
    assert history(trainer, "latent/log_ratio_std") == [0.0] * 8
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(trainer.model).items())
    assert all(tensor.dtype == torch.float32 for tensor in trainer.model.parameters())


def test_fp16_skips_a_step_whose_gradients_overflow(tmp_path):
    trainer = on_gpu(tmp_path, fp16=True, max_steps=3, num_iterations=1)
    trainer.accelerator.scaler._init_scale = 2.0**126
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((weights(trainer.model), trainer.accelerator.scaler.get_scale()))

    before = weights(trainer.model)
    trainer.add_callback(Watch())
    trainer.train()
    (first, scale), *_ = seen
    assert scale == 2.0**125
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.items())


def test_fp16_skips_a_step_whose_reward_is_bad(tmp_path):
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        return [None if len(calls) == 2 else float(len(set(c)) + i % 2) for i, c in enumerate(completions)]

    trainer = on_gpu(tmp_path, reward_funcs=reward, fp16=True, max_steps=4, num_iterations=1)
    trainer.train()
    assert history(trainer, "skipped_steps") == [0, 1, 0, 0]
    assert all(tensor.isfinite().all() for tensor in trainer.model.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_main_model_decodes_and_stays_as_it_is(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    random_main_model().save_pretrained(tmp_path / "main")
    tiny_tokenizer().save_pretrained(tmp_path / "main")
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    trainer = on_gpu(
        tmp_path,
        main_model=str(tmp_path / "main"),
        model=make_policy(random_main_model()),
        trainer_kwargs={"quantization_config": quantization},
    )
    before = weights(trainer.main_model)
    trainer.train()
    assert trainer.main_model.is_quantized and history(trainer, "grad_norm")[-1] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer.main_model).items())


# ---- Checkpoints, in use, DeepSpeed ----


def test_a_checkpoint_resumes_bit_identically_and_is_used_on_either_device(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "prescreening_fraction": 0.5}
    whole = on_gpu(tmp_path / "whole", max_steps=6, **settings)
    whole.train()
    resumed = on_gpu(tmp_path / "whole", max_steps=6, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-3"))
    for name, tensor in weights(whole.model).items():
        assert torch.equal(weights(resumed.model)[name], tensor), name
    random_main_model().save_pretrained(tmp_path / "main")
    tiny_tokenizer().save_pretrained(tmp_path / "main")
    texts = {}
    for device in ("cpu", "cuda"):
        reasoner = LatentReasoner.from_pretrained(
            str(tmp_path / "whole" / "run" / "checkpoint-6"), main_model=str(tmp_path / "main"), device=device
        )
        texts[device] = reasoner.generate(["A12", "B34"], do_sample=False).texts
    assert texts["cpu"] == texts["cuda"]


@pytest.fixture
def determinism():
    """What `full_determinism` sets for a whole process is taken back."""
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("stop", [4, 5])
def test_a_screened_run_resumes_bit_identically_where_it_is_asked_to(tmp_path, stop, determinism):
    # A sum of gradients of rows that share a reading has no order on a GPU, unless it is told to
    settings = {"max_steps": 8, "use_cpu": False, "full_determinism": True}
    straight = make_screened(tmp_path / "a", **settings)
    straight.train()
    make_screened(tmp_path / "b", **settings, save_strategy="steps", save_steps=stop).train()
    resumed = make_screened(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / f"checkpoint-{stop}"))
    assert history(resumed, "loss") == history(straight, "loss")
    for name, tensor in weights(straight.model).items():
        assert torch.equal(weights(resumed.model)[name], tensor), name


def test_zero2_trains_on_one_gpu(tmp_path):
    pytest.importorskip("deepspeed")
    random_main_model(max_position_embeddings=512).save_pretrained(tmp_path / "main")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "main")
    rows = [{"question": row["prompt"], "answer": row["answer"]} for row in tiny_dataset(32, 0)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "main_model_name_or_path": "main",
        "model_name_or_path": "fresh_layers",
        "assistant_num_layers": 1,
        "dataset_name": "train.jsonl",
        "eval_dataset_name": "train.jsonl",
        "num_eval_questions": 4,
        "max_completion_length": 4,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "exploration_check_prompts": 0,
        "output_dir": "out",
        "report_to": "none",
    }
    config = ROOT / "accelerate_configs" / "deepspeed_zero2.yaml"
    program = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 1]
    arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
    command = [sys.executable, *program, "-m", "trl_dlr.scripts.latent_grpo", *arguments]
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
