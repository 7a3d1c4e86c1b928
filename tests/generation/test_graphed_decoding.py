# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Greedy decoding with a static cache, whose step a GPU captures as a graph: `tests/gpu` has that."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.generation.test_transformers_engine import (
    PROMPTS,
    absolute_position_main_model,
    hybrid_main_model,
    ids_of,
    often_ending_main_model,
)
from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr.generation import TransformersEngine
from trl_dlr.generation.graphed_decoding import GraphedDecoding, can_be_graphed


@pytest.fixture
def graphed(monkeypatch):
    """As on a GPU, step by step."""
    monkeypatch.setattr(TransformersEngine, "is_graphed", property(lambda engine: engine.is_plainly_greedy))


def engines(main_model, max_new_tokens=12, **kwargs):
    """One that decodes with `generate`, and one with a static cache."""
    return [TransformersEngine(main_model, tiny_tokenizer(), max_new_tokens, **kwargs) for _ in range(2)]


def plain_and_graphed(monkeypatch, main_model, *rows, **kwargs):
    plain, with_cache = engines(main_model, **kwargs)
    monkeypatch.setattr(TransformersEngine, "is_graphed", False)
    expected = plain.generate(*rows)
    monkeypatch.setattr(TransformersEngine, "is_graphed", True)
    decoded = with_cache.generate(*rows)
    assert plain.graphed is None and with_cache.graphed is not None
    assert main_model.device.type == "cpu" or with_cache.graphed.graph is not None
    names = ("num_decoded", "num_completion_tokens", "num_truncated", "num_forward_tokens")
    assert [getattr(plain, name) for name in names] == [getattr(with_cache, name) for name in names]
    return expected, decoded


@pytest.mark.parametrize("make_main_model", [random_main_model, often_ending_main_model, absolute_position_main_model])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_shared_prompts_gaps_and_padding_give_the_tokens_of_generate(monkeypatch, make_main_model, batch_size):
    latent_embeds = 2 * torch.randn(9, 4, 64, generator=torch.Generator().manual_seed(1))
    num_samples, num_latents = torch.tensor([3, 2, 4]), torch.tensor([4, 1, 2, 3, 1, 1, 2, 3, 4])
    rows = ids_of(PROMPTS), latent_embeds, num_samples, num_latents
    expected, decoded = plain_and_graphed(monkeypatch, make_main_model(), *rows, batch_size=batch_size)
    assert decoded == expected
    assert len({tuple(ids) for ids in expected}) > 2


def test_a_main_model_alone_gives_the_tokens_of_generate(monkeypatch):
    expected, decoded = plain_and_graphed(monkeypatch, often_ending_main_model(), ids_of(PROMPTS))
    assert decoded == expected


def test_rows_end_where_generate_ends_them(monkeypatch):
    main_model = often_ending_main_model()
    latent_embeds = 2 * torch.randn(12, 2, 64, generator=torch.Generator().manual_seed(2))
    rows = ids_of(PROMPTS), latent_embeds, torch.tensor([4, 4, 4])
    for options in ({"min_new_tokens": 5}, {"stop_strings": ["1", "+"]}, {"min_new_tokens": 3, "stop_strings": "-"}):
        expected, decoded = plain_and_graphed(
            monkeypatch, main_model, *rows, max_new_tokens=24, generation_kwargs=options
        )
        assert decoded == expected
        assert len({len(ids) for ids in expected}) > 1


def test_a_cache_serves_every_batch_that_fits(graphed):
    main_model = random_main_model()
    first, again = engines(main_model)
    batches = [torch.randn(6, n, 64, generator=torch.Generator().manual_seed(n)) for n in (3, 1, 5)]
    alone = [first.generate(ids_of(PROMPTS), batch, torch.tensor([2, 2, 2])) for batch in batches]
    cache = first.graphed
    assert isinstance(cache, GraphedDecoding)
    for batch, expected in zip(reversed(batches), reversed(alone), strict=True):
        assert again.generate(ids_of(PROMPTS), batch, torch.tensor([2, 2, 2])) == expected
        assert first.generate(ids_of(PROMPTS), batch, torch.tensor([2, 2, 2])) == expected
        assert first.graphed is cache
    first.generate(ids_of(PROMPTS), batches[0][:3])  # half as many rows
    assert first.graphed is cache
    first.generate(ids_of(PROMPTS)[:2], batches[0][:2])  # fewer
    assert first.graphed is not cache
    cache = first.graphed
    projection = main_model.model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(projection.weight.clone(), requires_grad=False)
    first.generate(ids_of(PROMPTS)[:2], batches[0][:2])  # weights elsewhere
    assert first.graphed is not cache


def test_batches_of_several_sizes_share_a_cache(graphed, monkeypatch):
    built, build = [], GraphedDecoding.__init__
    monkeypatch.setattr(GraphedDecoding, "__init__", lambda *args: built.append(args[2]) or build(*args))
    engine = TransformersEngine(random_main_model(), tiny_tokenizer(), 4, batch_size=4)
    latent_embeds = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        engine.generate(ids_of(PROMPTS), latent_embeds, torch.tensor([2, 2, 1]))
    assert built == [4]


@pytest.mark.parametrize("min_new_tokens", [0, 3])
def test_end_tokens_that_the_model_does_not_have_are_never_chosen(monkeypatch, min_new_tokens):
    main_model = often_ending_main_model()
    main_model.generation_config.eos_token_id = [1, 500]
    options = {"generation_kwargs": {"min_new_tokens": min_new_tokens}}
    if min_new_tokens == 0:
        expected, decoded = plain_and_graphed(monkeypatch, main_model, ids_of(PROMPTS), **options)
        assert decoded == expected
    else:  # where `generate` has no such token to forbid
        monkeypatch.setattr(TransformersEngine, "is_graphed", True)
        engine = TransformersEngine(main_model, tiny_tokenizer(), 12, **options)
        assert min(map(len, engine.generate(ids_of(PROMPTS)))) > min_new_tokens


def test_a_cache_that_was_made_in_inference_mode_serves_outside_of_it(graphed):
    engine, _ = engines(random_main_model())
    with torch.inference_mode():
        inside = engine.generate(ids_of(PROMPTS))
    assert engine.generate(ids_of(PROMPTS)) == inside


def test_decoding_stops_when_all_rows_have_ended(graphed):
    engine = TransformersEngine(often_ending_main_model(), tiny_tokenizer(), max_new_tokens=50)
    latent_embeds = 2 * torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(2))
    completions = engine.generate(ids_of(PROMPTS[:1]), latent_embeds, torch.tensor([2]))
    assert max(map(len, completions)) < 16 and engine.graphed.num_new == 16


@pytest.mark.parametrize("options", [{"do_sample": True}, {"repetition_penalty": 2.0}])
def test_what_needs_more_than_the_last_token_is_left_to_generate(graphed, options):
    engine = TransformersEngine(random_main_model(), tiny_tokenizer(), 4, options)
    engine.generate(ids_of(PROMPTS))
    assert engine.graphed is None


def test_which_models_take_a_step_that_the_cpu_need_not_know():
    main_model = random_main_model()
    assert can_be_graphed(main_model)
    assert not TransformersEngine(main_model, tiny_tokenizer(), 4).is_graphed  # not on a CPU
    assert not can_be_graphed(hybrid_main_model())
    assert not can_be_graphed(random_main_model(attn_implementation="eager"))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    mistral = MistralConfig(**sizes, vocab_size=30, num_hidden_layers=1, sliding_window=8)
    assert not can_be_graphed(MistralForCausalLM(mistral))
    mistral.sliding_window = None
    assert can_be_graphed(MistralForCausalLM(mistral))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not can_be_graphed(random_main_model(rope_parameters=rope))
