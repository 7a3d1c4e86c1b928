# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest
import torch
from transformers import GenerationConfig

from tests.tiny import VOCABULARY, random_main_model, tiny_tokenizer
from trl_dlr.models.thinking import Thinker, ThinkingConfig, positions


TEXTS = ["A12", "B1", "C123456", "A12"]
GREEDY = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=1)
KINDS = {
    "all candidates": {"soft_token_temperature": 0.5},
    "LEPO's": {"soft_token_temperature": 0.3, "latent_top_k": 5, "latent_top_p": 0.9},
    "Latent-GRPO's": {"one_sided_noise": True, "latent_top_p": 0.9, "min_candidates": 6, "mixture_size": 4},
    "hidden states": {"latent_type": "hidden_states"},
}


def make(**kwargs):
    return Thinker(ThinkingConfig(**{"num_latents": 3, **kwargs}), tiny_tokenizer(), len(VOCABULARY))


def questions(texts=TEXTS):
    batch = tiny_tokenizer()(texts, return_tensors="pt", padding=True)
    return batch.input_ids, batch.attention_mask


def teacher_forced(thinker, model, input_ids, attention_mask, completion_ids, thoughts):
    """Logits and last hidden states of one pass over prompts and completions."""
    embeds = thinker.embed_prompt_and_completion(
        model.get_input_embeddings(), input_ids, completion_ids, thoughts.latents, thoughts.lengths
    )
    mask = torch.cat([attention_mask, torch.ones_like(completion_ids)], dim=1)
    output = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions(mask), output_hidden_states=True)
    before = slice(input_ids.size(1) - 1, -1)  # what each place of the completion is read off
    return output.logits[:, before], output.hidden_states[-1][:, before]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_teacher_forced_pass_finds_the_latents_that_were_thought(kind):
    model, thinker = random_main_model(), make(**KINDS[kind])
    thoughts = thinker.think(model, *questions(), deterministic=True)
    assert thoughts.lengths.tolist() == [3] * 4 and thoughts.has_ended.all()
    logits, states = teacher_forced(thinker, model, *questions(), torch.zeros(4, 3, dtype=torch.long), thoughts)
    for t in range(3):
        for name, latent in thinker.latents.draw(logits[:, t], states[:, t], deterministic=True).items():
            torch.testing.assert_close(thoughts.latents[name][:, t], latent, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_row_of_a_batch_thinks_and_answers_as_it_does_alone(kind):
    model, thinker = random_main_model(), make(**KINDS[kind])
    together = thinker.think(model, *questions(), deterministic=True)
    embeds = thinker.latents.embed(model.get_input_embeddings(), **together.latents)
    answers = thinker.answer(model, *questions(), embeds, together.lengths, GREEDY)
    for row, text in enumerate(TEXTS):
        alone = thinker.think(model, *questions([text]), deterministic=True)
        own = thinker.latents.embed(model.get_input_embeddings(), **alone.latents)
        torch.testing.assert_close(own[0], embeds[row], atol=1e-4, rtol=1e-4)
        answer = thinker.answer(model, *questions([text]), own, alone.lengths, GREEDY)[0].tolist()
        assert answers[row].tolist()[: len(answer)] == answer


@torch.no_grad()
def test_noise_differs_between_rows_and_none_is_drawn_for_hidden_states():
    model = random_main_model()
    soft = make().think(model, *questions()).latents["perturbed"]
    assert not torch.equal(soft[0], soft[3])  # the same question
    hidden = make(latent_type="hidden_states").think(model, *questions()).latents["states"]
    torch.testing.assert_close(hidden[0], hidden[3])


@torch.no_grad()
def test_thinking_ends_where_the_end_marker_is_the_most_likely_token():
    model, mixture = random_main_model(2), {"soft_token_temperature": 0.5}
    model.lm_head.weight *= 20  # peaked, so that it changes its mind between latents
    endless, token = make(num_latents=9, **mixture), list(VOCABULARY)[16]
    thoughts = endless.think(model, *questions(), deterministic=True)
    logits, _ = teacher_forced(endless, model, *questions(), torch.zeros(4, 9, dtype=torch.long), thoughts)
    ends_at = (logits.argmax(-1) == VOCABULARY[token]).int().argmax(1)
    assert ends_at.tolist() == [1, 1, 4, 1]
    thinker = make(num_latents=3, end_marker=token, stop_at_end_marker=True, **mixture)
    thoughts = thinker.think(model, *questions(), deterministic=True)
    assert thoughts.lengths.tolist() == [1, 1, 3, 1]
    assert thoughts.has_ended.tolist() == [True, True, False, True]
    at_the_cap = make(num_latents=4, end_marker=token, stop_at_end_marker=True, **mixture)
    assert at_the_cap.think(model, *questions(), deterministic=True).has_ended.all()
    # Rows that waited for the others answer as they do alone
    embeds = thinker.latents.embed(model.get_input_embeddings(), **thoughts.latents)
    answers = thinker.answer(model, *questions(), embeds, thoughts.lengths, GREEDY)
    for row, text in enumerate(TEXTS):
        alone = thinker.think(model, *questions([text]), deterministic=True)
        own = thinker.latents.embed(model.get_input_embeddings(), **alone.latents)
        answer = thinker.answer(model, *questions([text]), own, alone.lengths, GREEDY)[0].tolist()
        assert alone.lengths.item() == thoughts.lengths[row]
        assert answers[row].tolist()[: len(answer)] == answer


@torch.no_grad()
def test_an_answer_continues_prompt_latents_and_end_marker():
    model, thinker = random_main_model(), make(end_marker="==")
    thoughts = thinker.think(model, *questions())
    embeds = thinker.latents.embed(model.get_input_embeddings(), **thoughts.latents)
    answers = thinker.answer(model, *questions(), embeds, thoughts.lengths, GREEDY)
    end = torch.tensor(thinker.end_ids).expand(4, -1)
    completion = torch.cat([torch.zeros(4, 3, dtype=torch.long), end, answers], dim=1)
    logits, _ = teacher_forced(thinker, model, *questions(), completion, thoughts)
    greedy = logits[:, 5:].argmax(-1)
    is_before_eos = (answers == 1).cumsum(1) - (answers == 1).long() == 0
    assert torch.equal(greedy[is_before_eos], answers[is_before_eos])


def test_a_configuration_comes_back_from_a_folder(tmp_path):
    config = ThinkingConfig(num_latents=5, end_marker="==", stop_at_end_marker=True, latent_top_k=7)
    config.save_pretrained(tmp_path)
    assert ThinkingConfig.from_pretrained(str(tmp_path)) == config


@pytest.mark.parametrize(("content", "message"), [("{", "damaged or cut off"), ("[1]", "must hold a dictionary")])
def test_a_file_that_is_no_configuration_is_named(tmp_path, content, message):
    (tmp_path / "thinking_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ThinkingConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"latent_type": "words"}, "`latent_type` must be one of soft_tokens, hidden_states, got 'words'"),
        ({"num_latents": 0}, "`num_latents` must be at least 1, got 0"),
        ({"soft_token_temperature": 0.0}, "`soft_token_temperature` must be a positive number, got 0.0"),
        ({"noise_scale": -1.0}, "`noise_scale` must be a number of at least 0, got -1.0"),
        ({"latent_top_p": 0.0}, "`latent_top_p` must be above 0 and at most 1, got 0.0"),
        ({"latent_top_k": 100}, "`latent_top_k` must be at most the vocabulary's 25 tokens, got 100"),
        ({"min_candidates": 4, "latent_top_k": 3}, "`latent_top_k=3` must be at least `min_candidates=4`"),
        ({"mixture_size": 3}, "`mixture_size=3` must be at most `min_candidates=1`"),
        (
            {"latent_type": "hidden_states", "latent_top_k": 3},
            "`latent_top_k=3` has no meaning for `latent_type='hidden",
        ),
        ({"latent_type": "hidden_states", "noise_scale": 0.5}, "`noise_scale=0.5` has no meaning"),
        ({"stop_at_end_marker": True}, "`stop_at_end_marker=True` needs an `end_marker`"),
        ({"end_marker": "<|end-latent|>"}, "a special one, got '<|end-latent|>'"),
    ],
)
def test_what_does_not_fit_is_named(kwargs, message):
    with pytest.raises(ValueError) as error:
        make(**kwargs)
    assert message in str(error.value)


def test_a_folder_without_or_with_a_strange_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no thinking_config.json"):
        ThinkingConfig.from_pretrained(str(tmp_path))
    (tmp_path / "thinking_config.json").write_text('{"num_latents": 2, "mood": "good"}')
    with pytest.raises(ValueError, match="does not know: mood"):
        ThinkingConfig.from_pretrained(str(tmp_path))
