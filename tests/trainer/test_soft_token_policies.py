# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Trainers of a policy whose latents are soft tokens."""

import pytest
import torch
from peft import LoraConfig

from tests.tiny import VOCABULARY, random_main_model, tiny_dataset, tiny_reward, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import history, make_trainer, weights
from trl_dlr import (
    LatentGRPOConfig,
    LatentPolicyModel,
    LatentReasoner,
    LatentSFTConfig,
    LatentSFTTrainer,
    fresh_layers,
)
from trl_dlr.evaluation import preflight
from trl_dlr.memory_plan import plan_memory
from trl_dlr.report.probe import take_probe


SCORES = {
    "exact": {},
    "lepo": {"latent_top_k": 8},
    "latent_grpo": {"one_sided_noise": True, "latent_top_p": 0.9, "mixture_size": 4},
}


def make_policy(main_model, score="exact", **kwargs):
    torch.manual_seed(5)
    own = {"latent_density": "soft_tokens", "num_latents": 3, "soft_token_score": score, **SCORES[score], **kwargs}
    return LatentPolicyModel.from_assistant(fresh_layers(main_model, 1), main_model, tiny_tokenizer(), **own)


def make(tmp_path, score="exact", policy_kwargs=None, **kwargs):
    main_model = random_main_model()
    policy = make_policy(main_model, score, **(policy_kwargs or {}))
    return make_trainer(tmp_path, main_model=main_model, model=policy, **kwargs)


@pytest.mark.parametrize("score", SCORES)
def test_unchanged_weights_give_a_ratio_of_exactly_one_and_no_kl(tmp_path, score):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make(tmp_path, score, learning_rate=0.0, beta=0.1, max_steps=4, num_iterations=2, **sizes)
    trainer.train()
    assert history(trainer, "latent/log_ratio_std") == [0.0] * 4
    assert history(trainer, "latent/kl") == pytest.approx([0.0] * 4, abs=1e-6)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_every_term_trains_the_policy_and_leaves_the_main_model_as_it_is(tmp_path, score, sampling):
    kwargs = {"beta": 0.1, "gamma": 0.1, "hybrid_coef": 0.1, "first_latent_selection": True}
    screened = {"prescreening_fraction": 0.5, "prescreening_warmup_rollouts": 1}
    trainer = make(tmp_path, score, {"latent_sampling": sampling}, max_steps=6, **kwargs, **screened)
    before, main = weights(trainer.model), weights(trainer.main_model)
    trainer.train()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert {"latent_head.weight", "latent_in.weight" if sampling == "autoregressive" else "queries.weight"} <= moved
    assert any(name.startswith("assistant.layers") for name in moved)
    assert all(torch.equal(main[name], tensor) for name, tensor in trainer.main_model.state_dict().items())
    for name in ("loss", "latent/kl", "latent/contrastive", "latent/hybrid", "latent/top_probability"):
        assert history(trainer, name) and torch.tensor(history(trainer, name)).isfinite().all()
    assert history(trainer, "skipped_steps") == [0.0] * 6


def test_a_policy_is_made_from_an_assistant_and_the_arguments(tmp_path):
    main_model = random_main_model()
    options = {"latent_density": "soft_tokens", "soft_token_score": "lepo", "soft_token_temperature": 0.7}
    trainer = make_trainer(tmp_path, main_model=main_model, model=fresh_layers(main_model, 1), **options)
    config = trainer.policy.config
    assert (config.latent_density, config.latent_dim, config.soft_token_temperature) == (
        "soft_tokens",
        len(VOCABULARY),
        0.7,
    )


@pytest.mark.parametrize("learn_stop", [False, True])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, learn_stop):
    policy_kwargs = {"learn_stop": learn_stop}
    kwargs = {"policy_kwargs": policy_kwargs, "score": "latent_grpo", "beta": 0.1}
    straight = make(tmp_path / "a", **kwargs)
    straight.train()
    make(tmp_path / "b", save_strategy="steps", save_steps=5, **kwargs).train()
    resumed = make(tmp_path / "b", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / "checkpoint-5"))
    assert history(resumed, "loss") == history(straight, "loss")
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    other = make(tmp_path / "b", **{**kwargs, "policy_kwargs": {**policy_kwargs, "soft_token_temperature": 0.5}})
    with pytest.raises(ValueError, match="soft_token_temperature"):
        other.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / "checkpoint-5"))


def test_an_adapter_trains_saves_and_answers_after_loading(tmp_path):
    peft_config = LoraConfig(r=2, target_modules="all-linear")
    trainer = make(tmp_path, beta=0.1, trainer_kwargs={"peft_config": peft_config})
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert any("lora_B" in name for name in moved) and any("latent_head.modules_to_save" in name for name in moved)
    trainer.save_model(str(tmp_path / "saved"))
    main = {"main_model": trainer.main_model, "main_processing_class": tiny_tokenizer(), "device": "cpu"}
    loaded = LatentReasoner.from_pretrained(str(tmp_path / "saved"), max_new_tokens=4, **main)
    ours = LatentReasoner(trainer.model, tiny_tokenizer(), trainer.engine, tiny_tokenizer())
    prompts = ["A12", "B3"]
    torch.testing.assert_close(*(each.sample_latents(prompts, deterministic=True)[0] for each in (loaded, ours)))
    assert loaded.generate(prompts).texts == ours.generate(prompts).texts


def test_the_supervised_start_trains_soft_tokens_and_evaluation_reads_them(tmp_path):
    main_model = random_main_model()
    args = LatentSFTConfig(
        str(tmp_path / "run"),
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        max_completion_length=4,
        max_length=None,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = tiny_dataset(8, 0)
    trainer = LatentSFTTrainer(
        make_policy(main_model),
        args,
        rows.add_column("completion", [f"={answer}" for answer in rows["answer"]]),
        processing_class=tiny_tokenizer(),
        main_model=main_model,
        main_processing_class=tiny_tokenizer(),
    )
    before = weights(trainer.model)
    trainer.train()
    assert not history(trainer, "latent/mean_excess")  # the bound is of μ/σ, and there is no σ
    assert not torch.equal(before["latent_head.weight"], trainer.model.latent_head.weight)
    assert torch.tensor(history(trainer, "loss")).isfinite().all()
    reasoner = LatentReasoner(trainer.model, tiny_tokenizer(), trainer.engine, tiny_tokenizer())
    figures = preflight(reasoner, rows, tiny_reward, num_samples=2)
    assert figures["gradient/latent_head"] > 0 and torch.tensor(list(figures.values())).isfinite().all()
    probe = take_probe(reasoner, rows.select(range(2)), tiny_reward, num_samples=2)
    assert "offset_tokens" not in probe["questions"][0] and len(probe["questions"][0]["tokens"]) == 3


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`one_sided_noise=True` is for soft tokens alone"):
        LatentGRPOConfig(str(tmp_path / "run"), bf16=False, one_sided_noise=True)
    with pytest.raises(ValueError, match="Soft tokens.*are not planned"):
        args = LatentGRPOConfig(str(tmp_path / "run"), bf16=False, use_cpu=True)
        plan_memory(make_policy(random_main_model()), random_main_model(), args, prompt_length=4)
    assert not (tmp_path / "run").exists()
