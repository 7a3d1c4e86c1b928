# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Lfm2Config, Lfm2ForCausalLM

from tests.tiny import VOCABULARY, random_main_model, tiny_tokenizer
from trl_dlr.generation import TransformersEngine


PROMPTS = ["A12", "B1", "C123456"]


@pytest.fixture
def engine():
    return TransformersEngine(random_main_model(), tiny_tokenizer(), max_new_tokens=12)


def ids_of(prompts):
    return [tiny_tokenizer()(prompt)["input_ids"] for prompt in prompts]


def plain_greedy(model, ids, latent_embeds, max_new_tokens):
    """Greedy decoding written out: the whole sequence again for every token, no padding, no cache."""
    embeds = torch.cat([model.get_input_embeddings()(torch.tensor([ids])), latent_embeds[None]], dim=1)
    completion = []
    while len(completion) < max_new_tokens and (not completion or completion[-1] != 1):
        completion.append(model(inputs_embeds=embeds).logits[0, -1].argmax().item())
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([completion[-1:]]))], dim=1)
    return completion


def hybrid_main_model():
    """Of convolutions and attention, which keep different things in a cache."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    layer_types = ["conv", "full_attention", "conv"]
    kwargs = {"layer_types": layer_types, "num_hidden_layers": 3, "initializer_range": 0.2}
    tokens = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return Lfm2ForCausalLM(Lfm2Config(**sizes, **kwargs, **tokens)).eval()


@pytest.mark.parametrize("make_main_model", [random_main_model, hybrid_main_model])
@torch.no_grad()
def test_shared_prompts_and_padding_give_the_tokens_of_each_row_alone(make_main_model):
    engine = TransformersEngine(make_main_model(), tiny_tokenizer(), max_new_tokens=12)
    latent_embeds = 2 * torch.randn(6, 3, 64)
    num_samples = torch.tensor([2, 1, 3])
    together = engine.generate(ids_of(PROMPTS), latent_embeds, num_samples)
    rows = torch.arange(3).repeat_interleave(num_samples).tolist()
    expected = [
        plain_greedy(engine.model, ids_of(PROMPTS)[row], embeds, 12)
        for row, embeds in zip(rows, latent_embeds, strict=True)
    ]
    assert together == expected
    assert len({tuple(ids) for ids in expected}) > 1


@pytest.mark.parametrize("kind", ["rotary", "absolute"])
@torch.no_grad()
def test_rows_with_fewer_latents_give_the_tokens_of_each_row_alone(kind):
    main_model = often_ending_main_model() if kind == "rotary" else absolute_position_main_model()
    engine = TransformersEngine(main_model, tiny_tokenizer(), max_new_tokens=12)
    num_samples, num_latents = torch.tensor([3, 2, 4]), torch.tensor([4, 1, 2, 3, 1, 1, 2, 3, 4])
    latent_embeds = 2 * torch.randn(9, 4, 64, generator=torch.Generator().manual_seed(1))
    together = engine.generate(ids_of(PROMPTS), latent_embeds, num_samples, num_latents)
    rows = torch.arange(3).repeat_interleave(num_samples).tolist()
    ids = [ids_of(PROMPTS)[row] for row in rows]
    cut = [embeds[:number] for embeds, number in zip(latent_embeds, num_latents, strict=True)]
    assert together == [plain_greedy(main_model, *row, 12) for row in zip(ids, cut, strict=True)]
    assert together == [engine.generate([i], embeds[None])[0] for i, embeds in zip(ids, cut, strict=True)]
    assert together != engine.generate(ids_of(PROMPTS), latent_embeds, num_samples)


def absolute_position_main_model():
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=30, n_embd=64, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def test_a_row_without_a_latent_is_refused(engine):
    with pytest.raises(ValueError, match=r"num_latents.*at least 1 in every row.*\[2, 0\]"):
        engine.generate([[5, 6]], torch.randn(2, 2, 64), torch.tensor([2]), torch.tensor([2, 0]))


@torch.no_grad()
def test_without_latents_the_main_model_answers_alone(engine):
    alone = [plain_greedy(engine.model, ids, torch.empty(0, 64), 12) for ids in ids_of(PROMPTS)]
    assert engine.generate(ids_of(PROMPTS)) == alone


def test_completions_end_with_the_end_of_sequence_or_at_the_budget():
    main_model = random_main_model()
    with torch.no_grad():
        main_model.lm_head.weight[1] = main_model.model.norm.weight * 10  # often the likeliest token
    engine = TransformersEngine(main_model, tiny_tokenizer(), max_new_tokens=5)
    completions = engine.generate(ids_of(PROMPTS) * 4, torch.randn(12, 2, 64))
    assert all(len(ids) == 5 or ids[-1] == 1 for ids in completions)
    assert all(1 not in ids[:-1] for ids in completions)
    assert any(len(ids) < 5 for ids in completions)


def often_ending_main_model():
    main_model = random_main_model()
    with torch.no_grad():
        # The end's logit is now an affine function of the hidden state: some rows end early, some late, some never
        main_model.lm_head.weight[1] = 2.5 * main_model.lm_head.weight[2:].std() * torch.randn(64)
    return main_model


@pytest.mark.parametrize("batch_size", [None, 1, 5])
@torch.no_grad()
def test_rows_that_end_at_different_times_leave_the_batch(batch_size):
    engine = TransformersEngine(often_ending_main_model(), tiny_tokenizer(), max_new_tokens=12, batch_size=batch_size)
    num_samples = torch.tensor([9, 0, 8])
    latent_embeds = 2 * torch.randn(17, 3, 64, generator=torch.Generator().manual_seed(0))
    widths, forward = [], engine.model.forward
    engine.model.forward = lambda *args, **kwargs: (
        widths.append(len(x if (x := kwargs.get("input_ids")) is not None else kwargs["inputs_embeds"]))
        or forward(*args, **kwargs)
    )
    completions = engine.generate(ids_of(PROMPTS), latent_embeds, num_samples)
    del engine.model.forward
    rows = torch.arange(3).repeat_interleave(num_samples).tolist()
    for row, embeds, ids in zip(rows, latent_embeds, completions, strict=True):
        assert ids == plain_greedy(engine.model, ids_of(PROMPTS)[row], embeds, 12)
    assert len({len(ids) for ids in completions}) >= 3
    if batch_size is None:
        assert widths[0] == 17 and sorted(widths, reverse=True) == widths and min(widths) < 17 / 2
    else:
        assert max(widths) == batch_size
    assert engine.num_decoded == 17


def test_sampled_rows_differ_and_keep_to_the_budget():
    engine = TransformersEngine(
        often_ending_main_model(),
        tiny_tokenizer(),
        max_new_tokens=12,
        generation_kwargs={"do_sample": True, "temperature": 2.0, "min_new_tokens": 6},
    )
    torch.manual_seed(0)
    completions = engine.generate([[5, 6, 7]], torch.randn(1, 2, 64).expand(32, -1, -1), torch.tensor([32]))
    assert len({tuple(ids) for ids in completions}) > 16
    assert {len(ids) for ids in completions} <= set(range(6, 13)) and len({len(ids) for ids in completions}) >= 3


def test_penalties_see_all_tokens_so_far():
    # The penalty forbids what was said before, also when other rows have left the batch in between
    main_model = often_ending_main_model()
    engine = TransformersEngine(main_model, tiny_tokenizer(), 12, {"no_repeat_ngram_size": 1})
    completions = engine.generate([[5, 6, 7]], torch.randn(17, 2, 64), torch.tensor([17]))
    assert all(len(set(ids)) == len(ids) for ids in completions)
    assert len({len(ids) for ids in completions}) >= 3


def test_a_main_models_own_generation_config_does_not_change_what_is_greedy(engine):
    latent_embeds = torch.randn(3, 2, 64)
    expected = engine.generate(ids_of(PROMPTS), latent_embeds)
    settings = engine.model.generation_config
    settings.do_sample, settings.repetition_penalty, settings.temperature, settings.top_p = True, 3.0, 0.7, 0.5
    try:
        other = TransformersEngine(engine.model, tiny_tokenizer(), max_new_tokens=12)
        assert other.generate(ids_of(PROMPTS), latent_embeds) == expected
    finally:
        settings.do_sample, settings.repetition_penalty, settings.temperature, settings.top_p = (None,) * 4
    penalized = TransformersEngine(engine.model, tiny_tokenizer(), 12, {"repetition_penalty": 3.0})
    assert penalized.generate(ids_of(PROMPTS), latent_embeds) != expected


@pytest.mark.parametrize("name", ["max_new_tokens", "num_return_sequences", "num_beams"])
def test_a_row_has_one_completion(name):
    with pytest.raises(ValueError, match=f"generation_kwargs.*must not set {name}.*max_completion_length"):
        TransformersEngine(random_main_model(), tiny_tokenizer(), 5, {name: 2})


def test_nothing_to_decode_is_nothing_done(engine):
    assert engine.generate([[5, 6]], torch.empty(0, 2, 64), torch.tensor([0])) == []
    assert engine.num_decoded == engine.num_forward_tokens == 0


def test_forward_tokens_count_a_shared_prompt_once(engine):
    completions = engine.generate([[5, 6, 7]], torch.randn(4, 2, 64), torch.tensor([4]))
    assert engine.num_forward_tokens == 3 + 4 * 2 + sum(map(len, completions))


def test_forward_tokens_count_the_latents_that_are_there(engine):
    completions = engine.generate([[5, 6, 7]], torch.randn(3, 2, 64), torch.tensor([3]), torch.tensor([1, 2, 1]))
    assert engine.num_forward_tokens == 3 + 4 + sum(map(len, completions))


def test_the_model_is_left_as_it_was(engine):
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    engine.generate(ids_of(PROMPTS), torch.randn(3, 2, 64))
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.model.state_dict().items())
    assert not engine.model.lm_head._forward_pre_hooks


def test_too_long_a_prompt_is_refused(engine):
    with pytest.raises(ValueError, match="60 tokens.*num_latents=3.*max_completion_length=12.*64 positions"):
        engine.generate([[5] * 60], torch.randn(1, 3, 64))


def test_a_main_model_without_an_end_is_refused():
    main_model, tokenizer = random_main_model(), tiny_tokenizer()
    main_model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        TransformersEngine(main_model, tokenizer, max_new_tokens=5)


def test_a_tokenizer_without_padding_is_handled():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    engine = TransformersEngine(random_main_model(), tokenizer, max_new_tokens=5)
    latent_embeds = torch.randn(3, 2, 64)
    alone = [engine.generate([ids], row[None])[0] for ids, row in zip(ids_of(PROMPTS), latent_embeds, strict=True)]
    assert engine.generate(ids_of(PROMPTS), latent_embeds) == alone
