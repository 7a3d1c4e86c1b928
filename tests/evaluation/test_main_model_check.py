# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import copy

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import random_main_model, tiny_dataset, tiny_tokenizer
from trl_dlr import LatentGRPOConfig, LatentGRPOTrainer, fresh_layers
from trl_dlr.evaluation import check_main_model
from trl_dlr.generation import TransformersEngine, VLLMServerEngine


def check(main_model, path, num_rows=10, max_new_tokens=3, **kwargs):
    rows, tokenizer = tiny_dataset(num_rows, 0), tiny_tokenizer()
    engine = TransformersEngine(main_model, tokenizer, max_new_tokens)
    arguments = list(rows["prompt"]), [f"={answer}" for answer in rows["answer"]], str(path)
    return check_main_model(engine, tokenizer, *arguments, **kwargs)


def test_training_leaves_every_bit_of_the_main_model(tmp_path):
    main_model, path = random_main_model(), tmp_path / "new" / "main.safetensors"
    assert not check(main_model, path)
    before = path.read_bytes()
    trainer = LatentGRPOTrainer(
        model=fresh_layers(main_model, 1),
        main_model=main_model,
        main_processing_class=tiny_tokenizer(),
        reward_funcs=lambda completions, **kwargs: [float(i % 2) for i, _ in enumerate(completions)],
        args=LatentGRPOConfig(
            str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=3,
            exploration_check_prompts=0,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=tiny_dataset(16, 0),
    )
    start = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(start[name], tensor) for name, tensor in trainer.policy.state_dict().items())
    assert check(main_model, path)
    assert path.read_bytes() == before


def test_one_bit_of_one_weight_is_seen(tmp_path):
    main_model, path = random_main_model(), tmp_path / "main.safetensors"
    check(main_model, path)
    other = copy.deepcopy(main_model)
    assert check(other, path)
    weight = other.model.layers[0].mlp.down_proj.weight
    place = divmod(int(weight.abs().argmax()), weight.size(1))
    with torch.no_grad():
        weight[place] = torch.nextafter(weight[place], torch.tensor(torch.inf))
    with pytest.raises(ValueError, match=r"not the one recorded in .*main.safetensors': 0 of 10 answers and \d+ of"):
        check(other, path)
    assert check(main_model, path)


def test_other_answers_are_seen(tmp_path):
    path = tmp_path / "main.safetensors"
    check(random_main_model(0), path)
    with pytest.raises(ValueError, match=r"[1-9]\d* of 10 answers and 20 of 20 log-probabilities are others"):
        check(random_main_model(1), path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_rows": 9}, "questions '.*', and now it is '.*'"),
        ({"max_new_tokens": 4}, "max_new_tokens 3, and now it is 4"),
        ({"batch_size": 4}, "batch_size 8, and now it is 4"),
    ],
)
def test_records_of_other_questions_or_settings_are_not_compared(tmp_path, changed, message):
    path = tmp_path / "main.safetensors"
    check(random_main_model(), path)
    with pytest.raises(ValueError, match=f"was recorded with {message}: bits can only be compared under the same"):
        check(random_main_model(), path, **changed)


def test_what_cannot_be_checked_is_refused(tmp_path):
    save_file({"log_probs": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors' is no record of a main model"):
        check(random_main_model(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="got VLLMServerEngine. Load the main model with `engine='transformers'`"):
        check_main_model(object.__new__(VLLMServerEngine), tiny_tokenizer(), ["A12"], ["=3"], str(tmp_path / "main"))
    engine = TransformersEngine(random_main_model(), tiny_tokenizer(), 3)
    with pytest.raises(ValueError, match="`completions` must have one text for each .* got 1 for 2"):
        check_main_model(engine, tiny_tokenizer(), ["A12", "B12"], ["=3"], str(tmp_path / "main"))
