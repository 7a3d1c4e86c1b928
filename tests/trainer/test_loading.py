# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Revision, token, cache and code of a model reach all that is loaded with it."""

import json

import pytest
import torch
import transformers
from datasets import Dataset
from trl import ModelConfig

from tests.tiny import random_main_model, tiny_tokenizer
from tests.trainer.test_arguments import ON_CPU, ROWS, TRAINERS
from trl_dlr import LatentGRPOConfig, LatentGRPOTrainer, LatentPolicyModel, LatentReasoner, SoftTokenGRPOTrainer
from trl_dlr.generation.vllm_engine import vllm_hub_arguments
from trl_dlr.models.hub import hub_arguments
from trl_dlr.scripts.utils import PolicyScriptArguments, load_models


COMMITS = {"main": "a" * 40, "v1": "b" * 40}
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaModel):
    config_class = OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def put(folder, revision="main"):
    """A model that, with its tokenizer, differs between revisions."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(f"<{revision}>")
    random_main_model(seed=len(revision), vocab_size=40).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """A cache of the Hub with two revisions of `org/model`."""
    cache = tmp_path_factory.mktemp("cache")
    repo = cache / "models--org--model"
    (repo / "refs").mkdir(parents=True)
    for revision, commit in COMMITS.items():
        (repo / "refs" / revision).write_text(commit)
        put(repo / "snapshots" / commit, revision)
    return str(cache)


def make_trainer(trainer_class, tmp_path, model, init_kwargs, **settings):
    config_class, defaults = TRAINERS[trainer_class]
    models, settings = {"model": model}, {**defaults, "model_init_kwargs": init_kwargs, **settings}
    if hasattr(config_class, "main_model_init_kwargs"):
        models["main_model"] = model
        settings["main_model_init_kwargs"] = init_kwargs
    if "SFT" not in trainer_class.__name__:
        models["reward_funcs"] = lambda completions, **kwargs: [0.0] * len(completions)
    args = config_class(
        str(tmp_path / "run"), per_device_train_batch_size=4, max_completion_length=4, **settings, **ON_CPU
    )
    return trainer_class(**models, args=args, train_dataset=Dataset.from_list(ROWS))


@pytest.mark.filterwarnings("ignore:`LatentRLTrainer` is experimental")
@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_revision_token_and_cache_reach_all_loads(trainer_class, tmp_path, cache_dir, monkeypatch, caplog):
    seen = []

    def spied(auto_class):
        load = auto_class.from_pretrained

        def from_pretrained(name, *args, **kwargs):
            seen.append(
                (auto_class.__name__, name, {key: kwargs.get(key) for key in ("revision", "token", "cache_dir")})
            )
            return load(name, *args, **kwargs)

        return from_pretrained

    for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"):
        auto_class = getattr(transformers, name)
        monkeypatch.setattr(auto_class, "from_pretrained", spied(auto_class))
    init_kwargs = {"revision": "v1", "token": "hf_token", "cache_dir": cache_dir}
    trainer = make_trainer(trainer_class, tmp_path, "org/model", init_kwargs)
    assert "AutoTokenizer" in {auto_class for auto_class, *_ in seen}
    assert not [load for load in seen if load[1] == "org/model" and load[2] != init_kwargs]
    assert "<v1>" in trainer.processing_class.get_vocab()
    if trainer_class is SoftTokenGRPOTrainer:
        assert "will be ignored" not in caplog.text
    if hasattr(trainer, "main_model"):
        assert "<v1>" in trainer.main_processing_class.get_vocab()
        embeddings = trainer.main_model.get_input_embeddings().weight
        assert torch.equal(embeddings, random_main_model(2, vocab_size=40).get_input_embeddings().weight)
        assert trainer.policy.config.main_model_revision == "v1"


def test_a_saved_policy_finds_the_revision_of_its_main_model(tmp_path, cache_dir):
    trainer = make_trainer(LatentGRPOTrainer, tmp_path, "org/model", {"revision": "v1", "cache_dir": cache_dir})
    trainer.save_model()
    reasoner = LatentReasoner.from_pretrained(str(tmp_path / "run"), cache_dir=cache_dir)
    assert "<v1>" in reasoner.main_processing_class.get_vocab()
    given = LatentReasoner.from_pretrained(
        str(tmp_path / "run"), "org/model", main_model_init_kwargs={"revision": "v1", "cache_dir": cache_dir}
    )
    assert "<v1>" in given.main_processing_class.get_vocab()


def test_the_command_line_too(tmp_path, cache_dir):
    args = LatentGRPOConfig(
        str(tmp_path),
        main_model_init_kwargs={"revision": "v1", "cache_dir": cache_dir},
        trust_remote_code=True,
        **ON_CPU,
    )
    script_args = PolicyScriptArguments("data", main_model_name_or_path="org/model", assistant_num_layers=1)
    models = load_models(script_args, args, ModelConfig(model_name_or_path="first_layers"))
    assert models["main_model"].config._commit_hash == "v1"
    assert torch.equal(
        models["model"].get_input_embeddings().weight, models["main_model"].get_input_embeddings().weight.float()
    )


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A model and a tokenizer with code of their own."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    put(folder)
    (folder / "own.py").write_text(CODE)
    autos = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    for name, changes in (
        ("config.json", {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": autos}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}},
        ),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


@pytest.mark.filterwarnings("ignore:`LatentRLTrainer` is experimental", "ignore:The assistant, a OwnModel")
@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_code_of_a_model_that_is_trusted_reaches_all_loads(trainer_class, tmp_path, own_code):
    trainer = make_trainer(trainer_class, tmp_path, own_code, None, trust_remote_code=True)
    model = trainer.policy.assistant if hasattr(trainer, "policy") else trainer.model
    assert type(model).__name__ == ("OwnModel" if hasattr(trainer, "policy") else "OwnForCausalLM")
    assert type(trainer.processing_class).__name__ == "OwnTokenizer"
    if hasattr(trainer, "main_model"):
        assert type(trainer.main_processing_class).__name__ == "OwnTokenizer"


def test_an_assistant_from_a_main_model_with_code_of_its_own(tmp_path, own_code):
    args = LatentGRPOConfig(str(tmp_path), trust_remote_code=True, max_completion_length=4, **ON_CPU)
    script_args = PolicyScriptArguments("data", main_model_name_or_path=own_code, assistant_num_layers=1)
    for name in ("first_layers", "fresh_layers"):
        models = load_models(script_args, args, ModelConfig(model_name_or_path=name))
        with pytest.warns(UserWarning, match="saved policy brings none.*AutoConfig.register.'own_llama', OwnConfig"):
            trainer = LatentGRPOTrainer(**models, args=args, reward_funcs=len, train_dataset=Dataset.from_list(ROWS))
        assert type(trainer.policy.assistant).__name__ == "OwnModel"


def test_code_that_is_not_trusted_is_not_run(tmp_path, own_code):
    with pytest.raises(ValueError, match="trust_remote_code"):
        make_trainer(LatentGRPOTrainer, tmp_path, own_code, None)


def test_vllm_is_told_where_its_weights_come_from():
    hub = hub_arguments({"revision": "v1", "token": "t", "cache_dir": "c", "dtype": "auto"}, trust_remote_code=True)
    assert vllm_hub_arguments(hub) == {
        "trust_remote_code": True,
        "revision": "v1",
        "tokenizer_revision": "v1",
        "hf_token": "t",
        "download_dir": "c",
    }
    assert vllm_hub_arguments(hub_arguments(None)) == {"trust_remote_code": False}


@pytest.mark.filterwarnings("ignore:`LatentRLTrainer` is experimental")
@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_what_was_cut_off_is_named(trainer_class, tmp_path):
    for file in ("model.safetensors", "tokenizer.json"):
        folder = tmp_path / file
        put(folder)
        (folder / file).write_bytes((folder / file).read_bytes()[:100])
        with pytest.raises(ValueError, match=f"{file}' has a file that is damaged or cut off"):
            make_trainer(trainer_class, tmp_path, str(folder), None)
    with pytest.raises(ValueError, match=r"The folder '\./nope' does not exist"):
        make_trainer(trainer_class, tmp_path, "./nope", None)


def test_an_assistant_that_was_cut_off_is_named(tmp_path):
    put(tmp_path / "assistant")
    path = tmp_path / "assistant" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="assistant' has a file that is damaged or cut off"):
        LatentPolicyModel.from_assistant(str(tmp_path / "assistant"), random_main_model(), tiny_tokenizer())
