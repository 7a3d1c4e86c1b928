# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from tests.tiny import random_main_model, tiny_dataset, tiny_reward, tiny_tokenizer
from trl_dlr import ThinkingConfig, ThinkingReasoner
from trl_dlr.evaluation import evaluate_latents
from trl_dlr.models.thinking import Thinker


PROMPTS = ["A12", "B1", "C123456"]
CONFIGS = {
    "soft tokens": ThinkingConfig(num_latents=3, soft_token_temperature=0.5),
    "markers": ThinkingConfig(num_latents=3, start_marker="+", end_marker="=="),
    "hidden states": ThinkingConfig("hidden_states", num_latents=2, end_marker="="),
    "learned end": ThinkingConfig(
        num_latents=3, end_marker=tiny_tokenizer().decode([16]), stop_at_end_marker=True, soft_token_temperature=0.5
    ),
}


def peaked_model():
    model = random_main_model(2)
    with torch.no_grad():
        model.lm_head.weight *= 20
    return model


def make_reasoner(kind="markers", model=None):
    return ThinkingReasoner(peaked_model() if model is None else model, tiny_tokenizer(), CONFIGS[kind], 5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_answers_are_those_of_the_thinker(kind):
    reasoner = make_reasoner(kind)
    thinker = Thinker(CONFIGS[kind], tiny_tokenizer(), 25)
    model, greedy = reasoner.engine.model, GenerationConfig(max_new_tokens=5, pad_token_id=0, eos_token_id=1)
    batch = tiny_tokenizer()(
        [f"{p}{CONFIGS[kind].start_marker or ''}" for p in PROMPTS], return_tensors="pt", padding=True
    )
    prompts = batch.input_ids, batch.attention_mask
    thoughts = thinker.think(model, *prompts, deterministic=True)
    embeds = thinker.latents.embed(model.get_input_embeddings(), **thoughts.latents)
    expected = thinker.answer(model, *prompts, embeds, thoughts.lengths, greedy)
    output = reasoner.generate(PROMPTS)
    assert output.texts == tiny_tokenizer().batch_decode(expected, skip_special_tokens=True)
    markers = len(thinker.start_ids) + len(thinker.end_ids)
    assert output.lengths.flatten().tolist() == (thoughts.lengths + markers).tolist()
    assert [reasoner.generate([prompt]).texts[0] for prompt in PROMPTS] == output.texts
    assert "".join(reasoner.stream(PROMPTS[0])) == output.texts[0]


def test_samples_differ_and_come_again_with_their_seed():
    reasoner = make_reasoner("soft tokens")
    first = reasoner.generate(PROMPTS, num_samples=4, seed=0)
    assert not torch.equal(first.latents[0, 0], first.latents[0, 1])
    assert torch.equal(first.latents, reasoner.generate(PROMPTS, num_samples=4, seed=0).latents)
    majority = reasoner.generate(PROMPTS, num_samples=4, seed=0, selection="majority")
    assert all(text in texts for text, texts in zip(majority.texts, first.candidates, strict=True))


def test_a_saved_model_answers_as_before_and_keeps_its_card(tmp_path):
    reasoner = make_reasoner()
    reasoner.save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "ThinkingReasoner.from_pretrained" in card and "3 latents (`soft_tokens`)" in card
    loaded = ThinkingReasoner.from_pretrained(str(tmp_path / "model"), max_new_tokens=5)
    assert loaded.generate(PROMPTS).texts == reasoner.generate(PROMPTS).texts
    assert loaded.policy.config == CONFIGS["markers"] and loaded.model_card == card


def test_an_adapter_answers_as_before(tmp_path):
    model = peaked_model()
    model.save_pretrained(tmp_path / "base")
    model.config.name_or_path = model.name_or_path = str(tmp_path / "base")
    adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    CONFIGS["soft tokens"].save_pretrained(tmp_path / "adapter")
    loaded = ThinkingReasoner.from_pretrained(str(tmp_path / "adapter"), max_new_tokens=5)
    expected = make_reasoner("soft tokens", adapter.merge_and_unload().eval()).generate(PROMPTS)
    output = loaded.generate(PROMPTS)
    torch.testing.assert_close(output.latents, expected.latents, atol=1e-3, rtol=1e-3)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))  # as it is pushed
    with pytest.raises(ValueError, match="adapter of a model that lay in a folder of another machine"):
        ThinkingReasoner.from_pretrained(str(tmp_path / "adapter"))


def test_prompts_that_are_longer_than_the_models_positions():
    for prompt in ("A" * 63, "A" * 58):  # too long for the thought, and for the answer
        with pytest.raises(ValueError, match=f"prompt of {len(prompt)} tokens.*64 positions"):
            make_reasoner("soft tokens").generate([prompt])


def test_what_is_no_prompt():
    with pytest.raises(ValueError, match="`prompts` has a prompt at index 1 that is empty"):
        make_reasoner().generate(["A12", ""])


def test_no_tokens_or_rows_of_an_answer_are_refused():
    with pytest.raises(ValueError, match="`batch_size` must be at least 1 or `None`, got 0"):
        ThinkingReasoner(peaked_model(), tiny_tokenizer(), CONFIGS["markers"], batch_size=0)
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1, got 0"):
        ThinkingReasoner(peaked_model(), tiny_tokenizer(), CONFIGS["markers"], 0)


def test_a_model_that_does_not_think_is_refused(tmp_path):
    random_main_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not trained to think, or not yet"):
        ThinkingReasoner.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("control", ThinkingReasoner.controls)
def test_controls_are_evaluated(control):
    figures = evaluate_latents(make_reasoner(), tiny_dataset(6, 0), tiny_reward, control=control, num_samples=2)
    assert 0 <= figures["accuracy"] <= figures["pass_at_k"] <= 1


def test_zero_latents_stand_between_the_markers():
    reasoner = make_reasoner()
    zero, own = reasoner.policy.zero_latents(2), reasoner.generate(PROMPTS[:2]).latents[:, 0]
    assert not zero.latents[:, 1:4].any() and own[:, 1:4].any()
    assert torch.equal(zero.latents[:, [0, 4, 5]], own[:, [0, 4, 5]])
    assert zero.lengths.tolist() == [6, 6]
