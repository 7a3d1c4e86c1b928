# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import HfArgumentParser

from tests.tiny import tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import make_trainer
from tests.trainer.test_latent_sft_trainer import make_sft_trainer
from trl_dlr import LatentGRPOConfig, LatentPolicyConfig, LatentSFTTrainer
from trl_dlr.trainer.hub import chosen_arguments, read_results, training_card


def card(output_dir, config=None, **kwargs):
    config = config or LatentPolicyConfig(main_model_name_or_path="org/main")
    args = LatentGRPOConfig(str(output_dir), report_to="none", use_cpu=True, bf16=False, learning_rate=0.25)
    paper = {"title": "A paper", "id": "2601.17275", "citation": "@article{x}"}
    return ModelCard(training_card("user/policy", config, args, "A method", paper, ["a-tag"], **kwargs))


def test_a_run_without_figures_or_plots(tmp_path):
    made = card(tmp_path)
    assert made.data.base_model == ["org/main"] and "a-tag" in made.data.tags
    assert made.data.eval_results is None and made.data.datasets is None
    assert "## Results" not in made.text and "![" not in made.text
    assert "| `learning_rate` | `0.25` |" in made.text


def test_figures_plots_and_dataset(tmp_path):
    (tmp_path / "report").mkdir()
    for name in ("b.png", "a.png", "c.csv"):
        (tmp_path / "report" / name).write_text("")
    figures = {
        "no_latents/accuracy": 0.1,
        "policy/accuracy": 0.5,
        "policy/mixed": 1.0,
        "loss": 2.0,
        "policy/k": "x",
    }
    (tmp_path / "eval_results.json").write_text(json.dumps(figures))
    assert read_results(str(tmp_path)) == {
        "no_latents": {"accuracy": 0.1},
        "policy": {"accuracy": 0.5, "mixed": 1.0},
    }
    made = card(tmp_path, dataset_name="openai/gsm8k")
    assert "| | accuracy | mixed |\n|---|---|---|\n| no latents | 0.100 |  |\n| policy | 0.500 | 1.000 |" in made.text
    assert "![a](report/a.png)\n\n![b](report/b.png)" in made.text and "c.csv" not in made.text
    assert {(result.metric_type, result.metric_value) for result in made.data.eval_results} == {
        ("accuracy", 0.5),
        ("mixed", 1.0),
    }
    assert made.data.datasets == "openai/gsm8k" and "on `openai/gsm8k`" in made.text


def test_no_credentials_of_a_dataset(tmp_path):
    made = card(tmp_path, dataset_name="https://user:pw@host.org/train.jsonl")
    assert "https://<CREDENTIALS>" in made.text and "pw" not in made.text


@pytest.mark.parametrize("dataset_name", ["/data/train.jsonl", "./train.jsonl", "~/train.jsonl"])
def test_no_path_of_this_machine(tmp_path, dataset_name):
    main = tmp_path / "main"
    main.mkdir()
    config = LatentPolicyConfig(main_model_name_or_path=str(main))
    made = card(tmp_path, config, dataset_name=dataset_name)
    assert made.data.base_model is None and made.data.datasets is None
    assert "the frozen main model, a local model, reads them" in made.text
    assert str(tmp_path) not in made.content and dataset_name not in made.content
    assert 'LatentReasoner.from_pretrained("user/policy", main_model)' in made.text


def test_arguments_leave_out_places_and_secrets(tmp_path):
    args = LatentGRPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        hub_token="hf_secret",
        hub_model_id="user/policy",
        run_name="mine",
        report_to="tensorboard",
        num_generations=4,
        main_model_init_kwargs={"cache_dir": "/data/cache"},
        generation_kwargs={"repetition_penalty": 1.5},
        anchor_text="a|b\n",
        gamma=0.5,
    )
    chosen = chosen_arguments(args)
    assert chosen["num_generations"] == "4" and chosen["gamma"] == "0.5"
    assert chosen["generation_kwargs"] == "{'repetition_penalty': 1.5}"
    assert chosen["anchor_text"] == "a\\|b\\n"
    assert not {"hub_token", "hub_model_id", "run_name", "report_to", "output_dir", "main_model_init_kwargs"} & set(
        chosen
    )
    assert "learning_rate" not in chosen  # its default
    assert not [value for value in chosen.values() if "secret" in value or "/" in value]


def test_only_fields_that_were_set_are_listed(tmp_path):
    on_cpu = {"use_cpu": True, "bf16": False}  # derived: steps_per_generation, generation_batch_size, logging_dir
    assert chosen_arguments(LatentGRPOConfig(str(tmp_path), **on_cpu)) == {"bf16": "False"}
    (args,) = HfArgumentParser(LatentGRPOConfig).parse_dict({"output_dir": str(tmp_path), **on_cpu})
    assert chosen_arguments(args) == {"bf16": "False"}
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    (args,) = HfArgumentParser(LatentGRPOConfig).parse_args_into_dataclasses(arguments)
    assert chosen_arguments(args) == {"bf16": "False"}
    args = LatentGRPOConfig(str(tmp_path), per_device_train_batch_size=8, num_generations=4, **on_cpu)
    assert chosen_arguments(args) == {"bf16": "False", "per_device_train_batch_size": "8", "num_generations": "4"}


def test_the_question_of_a_card_is_of_the_kind_of_the_dataset_and_none_of_it(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "private"}], "answer": "1"}] * 8
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizers = {"processing_class": tokenizer, "main_processing_class": tokenizer}
    trainer = make_trainer(tmp_path, train_dataset=Dataset.from_list(rows), trainer_kwargs=tokenizers)
    trainer.create_model_card()
    made = ModelCard.load(tmp_path / "run" / "README.md")
    assert '[[{"role": "user", "content": "What is 3 + 4?"}]]' in made.text and "private" not in made.content


def test_a_saved_policy_and_its_checkpoints_have_a_card(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        made = ModelCard.load(folder / "README.md")
        assert 'print(reasoner.generate(["What is 3 + 4?"]).texts)' in made.text
        assert not [prompt for prompt in trainer.train_dataset["prompt"] if prompt in made.content]
        assert "deeplatent-reasoning" in made.data.tags and str(tmp_path) not in made.content
        assert not (folder / "training_args.bin").exists()


def test_the_supervised_trainer_has_its_own_paper(tmp_path):
    trainer = make_sft_trainer(tmp_path)
    assert isinstance(trainer, LatentSFTTrainer)
    trainer.create_model_card(dataset_name="openai/gsm8k", tags="one-more")
    trainer.save_model()
    made = ModelCard.load(Path(trainer.args.output_dir, "README.md"))
    assert "Latent SFT" in made.text and "papers/2412.06769" in made.text and "@article{hao2024training" in made.text
    assert made.data.datasets == "openai/gsm8k"
