# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Adapters of every kind, and reward functions in every form."""

import inspect

import pytest
import torch
from datasets import Dataset
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GPT2Config, GPT2LMHeadModel

from tests.families import tiny_family
from tests.tiny import VOCABULARY, random_main_model, tiny_tokenizer
from tests.trainer.test_arguments import ROWS, TRAINERS
from tests.trainer.test_inputs import ON_PROMPTS, make_trainer
from tests.trainer.test_latent_grpo_trainer import make_policy
from tests.trainer.test_latent_grpo_trainer import make_trainer as make_grpo_trainer
from trl_dlr import LatentPolicyModel
from trl_dlr.models.loading import load_policy
from trl_dlr.trainer.policy_training import adapter_for_policy


def adapted(model):
    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@pytest.mark.parametrize(
    ("peft_config", "parts"),
    [
        (LoraConfig(r=2), {"q_proj", "v_proj"}),
        (LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), {"q_proj"}),
        (
            LoraConfig(r=2, target_modules="all-linear"),
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        (LoHaConfig(r=2), {"q_proj", "v_proj"}),
        (OFTConfig(oft_block_size=4), {"q_proj", "v_proj"}),
        (VeraConfig(r=2), {"q_proj", "v_proj"}),
        (LNTuningConfig(), {"input_layernorm", "post_attention_layernorm", "norm"}),
        (
            IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            {"k_proj", "down_proj"},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_adapters_of_the_assistant_train_and_come_back(tmp_path, peft_config, parts):
    trainer = make_grpo_trainer(tmp_path, max_steps=1, trainer_kwargs={"peft_config": peft_config})
    assert {name.split(".")[-1] for name in adapted(trainer.model)} == parts
    assert all("assistant" in name for name in adapted(trainer.model))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {"latent_head", "latent_in"} <= {part for name in before for part in name.split(".")}
    trainer.train()
    trainer.save_model()
    moved = [
        name for name, p in trainer.model.named_parameters() if name in before and not torch.equal(p, before[name])
    ]
    assert any("assistant" in name for name in moved) and any("latent_head" in name for name in moved)
    trained = trainer.model.state_dict()
    loaded = load_policy(trainer.args.output_dir).state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in loaded.items())


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_an_assistant_whose_layers_are_no_linear_ones(target_modules):
    assistant = GPT2LMHeadModel(GPT2Config(vocab_size=len(VOCABULARY), n_embd=64, n_layer=1, n_head=4, n_positions=64))
    main_model = random_main_model()
    policy = LatentPolicyModel.from_assistant(assistant, main_model, tiny_tokenizer(), injection="components")
    model = get_peft_model(policy, adapter_for_policy(policy, LoraConfig(r=2, target_modules=target_modules)))
    expected = {"c_attn"} if target_modules is None else {"c_attn", "c_proj", "c_fc"}
    assert {name.split(".")[-1] for name in adapted(model)} == expected
    assert all("assistant" in name for name in adapted(model))


@pytest.mark.parametrize("family", ["zamba2", "gemma3n_text", "llama4_text"])
def test_all_linear_layers_are_no_layers_that_bear_the_same_number_and_no_routers(family):
    """Linear layers in a list are named by their place in it, as the assistant's layers are."""
    policy = make_policy(random_main_model(), assistant=tiny_family(family))
    model = get_peft_model(policy, adapter_for_policy(policy, LoraConfig(r=2, target_modules="all-linear")))
    names = {name.partition("assistant.")[2] for name in adapted(model)}
    assert names and not any(name.split(".")[-2:-1] == ["layers"] or name.endswith(".router") for name in names)


NO_ADAPTERS_OF_MODULES = [
    PromptTuningConfig(num_virtual_tokens=2),
    PrefixTuningConfig(num_virtual_tokens=2),
    PromptEncoderConfig(num_virtual_tokens=2),
    PolyConfig(),
]


@pytest.mark.filterwarnings("ignore:`LatentRLTrainer` is experimental")
@pytest.mark.parametrize("peft_config", NO_ADAPTERS_OF_MODULES, ids=lambda value: type(value).__name__)
def test_what_is_no_adapter_of_modules_is_refused(tmp_path, peft_config):
    name = type(peft_config).__name__
    for trainer_class in TRAINERS:
        with pytest.raises(
            ValueError, match=f"`peft_config` must be of an adapter of modules.*LoraConfig.*got {name}"
        ):
            make_trainer(trainer_class, tmp_path, Dataset.from_list(ROWS), trainer_kwargs={"peft_config": peft_config})


@pytest.mark.filterwarnings("ignore:`LatentRLTrainer` is experimental")
@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_a_model_with_such_an_adapter_is_refused(tmp_path, trainer_class):
    model, config = random_main_model(seed=1), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    if "main_model" in inspect.signature(trainer_class).parameters:  # PEFT has no virtual tokens for a policy
        model, config = make_policy(model), PolyConfig(target_modules=["q_proj"])
    models = {"model": get_peft_model(model, config)}
    with pytest.raises(ValueError, match=f"must be of an adapter of modules.*got {type(config).__name__}"):
        make_trainer(trainer_class, tmp_path, Dataset.from_list(ROWS), trainer_kwargs=models)


@pytest.mark.parametrize("peft_config", [AdaptionPromptConfig(), TrainableTokensConfig(token_indices=[1])])
def test_the_projection_layers_must_be_saved_with_the_adapter(tmp_path, peft_config):
    with pytest.raises(ValueError, match="`modules_to_save`.*projection layers are trained in full"):
        make_grpo_trainer(tmp_path, trainer_kwargs={"peft_config": peft_config})


def test_an_adapter_without_default_modules_and_what_is_none(tmp_path):
    with pytest.raises(ValueError, match="target_modules` must be set: PEFT knows no default of IA3Config"):
        make_grpo_trainer(tmp_path, trainer_kwargs={"peft_config": IA3Config(feedforward_modules=["down_proj"])})
    with pytest.raises(ValueError, match="`peft_config` must be a `PeftConfig`.*got dict"):
        make_grpo_trainer(tmp_path, trainer_kwargs={"peft_config": {"r": 2}})


@pytest.mark.filterwarnings("ignore:`LatentRLTrainer` is experimental")
@pytest.mark.parametrize("trainer_class", ON_PROMPTS)
def test_rewards_in_a_tuple(trainer_class, tmp_path):
    def ones(completions, **kwargs):
        return [1.0] * len(completions)

    def twos(completions, **kwargs):
        return [2.0] * len(completions)

    dataset = Dataset.from_list(ROWS)
    trainer = make_trainer(trainer_class, tmp_path, dataset, trainer_kwargs={"reward_funcs": (ones, twos)})
    assert trainer.reward_func_names == ["ones", "twos"] and [f([""]) for f in trainer.reward_funcs] == [[1.0], [2.0]]
    with pytest.raises(ValueError, match="`reward_funcs` must be functions, models or names of models.*got dict"):
        make_trainer(trainer_class, tmp_path, dataset, trainer_kwargs={"reward_funcs": {"a": ones}})
    for nothing, message in ((None, "must be functions, models.*got NoneType"), ([], "at least one reward function")):
        with pytest.raises(ValueError, match=f"`reward_funcs` .*{message}"):
            make_trainer(trainer_class, tmp_path, dataset, trainer_kwargs={"reward_funcs": nothing})
