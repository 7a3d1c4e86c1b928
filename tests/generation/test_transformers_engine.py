# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import re
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.tiny import VOCABULARY, random_main_model, tiny_tokenizer
from trl_dlr import LatentPolicyModel, SoftTokenGRPOConfig, ThinkingConfig, fresh_layers
from trl_dlr.generation import TransformersEngine
from trl_dlr.generation.text import StopStrings
from trl_dlr.generation.vllm_engine import sampling_fields
from trl_dlr.models.thinking import Thinker


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


OF_THE_MAIN_MODEL = [
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(2, 12))},
    {"begin_suppress_tokens": list(range(2, 12))},
    {"forced_eos_token_id": 3},
    {"guidance_scale": 1.5},
    {"bad_words_ids": [[token] for token in range(2, 12)]},
    {"stop_strings": list("0123456789=")},
    {"min_length": 50},
    {"max_length": 3},
    {"max_time": 1e-9},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"return_dict_in_generate": True, "output_scores": True},
    {"prompt_lookup_num_tokens": 2},
    {"exponential_decay_length_penalty": (1, 2.0)},
    {"repetition_penalty": 3.0, "do_sample": True, "temperature": 3.0},
]


@pytest.mark.parametrize("settings", OF_THE_MAIN_MODEL, ids=lambda settings: "-".join(settings))
def test_greedy_is_greedy_whatever_the_main_model_says(settings):
    main_model, latent_embeds = often_ending_main_model(), torch.randn(3, 2, 64)
    expected = [
        plain_greedy(main_model, ids, embeds, 12) for ids, embeds in zip(ids_of(PROMPTS), latent_embeds, strict=True)
    ]
    for name, value in settings.items():
        setattr(main_model.generation_config, name, value)
    own = main_model.generation_config
    engine = TransformersEngine(main_model, tiny_tokenizer(), max_new_tokens=12)
    assert engine.generate(ids_of(PROMPTS), latent_embeds) == expected
    assert "".join(engine.stream(ids_of(PROMPTS)[2], latent_embeds[2:])) == engine.decode(expected[2:])[0]
    assert main_model.generation_config is own and own.to_diff_dict().items() >= settings.items()


@pytest.mark.parametrize(
    "name",
    ["max_new_tokens", "num_return_sequences", "num_beams", "cache_implementation", "forced_eos_token_id", "max_time"]
    + ["begin_suppress_tokens", "guidance_scale", "stop", "temprature"],
)
def test_a_row_has_one_completion(name):
    with pytest.raises(ValueError, match=f"generation_kwargs.*must not set {name}:.*max_completion_length.*do_sample"):
        TransformersEngine(random_main_model(), tiny_tokenizer(), 5, {name: 2})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(("min_new_tokens", value, "must be int") for value in (None, "3", 2.5, True)),
        ("min_new_tokens", 6, "must be between 0 and the 5 tokens that a completion has at most"),
        ("repetition_penalty", "1", "must be float or unset"),
        ("do_sample", "yes", "must be bool or unset"),
    ],
)
def test_generation_kwargs_of_a_wrong_type_or_size(name, value, message):
    message = f"generation_kwargs['{name}']` {message}, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        TransformersEngine(random_main_model(), tiny_tokenizer(), 5, {name: value})
    if name == "min_new_tokens":
        with pytest.raises(ValueError, match=re.escape(message.replace(name, "min_tokens"))):
            sampling_fields(5, [1], {"min_tokens": value})
        with pytest.raises(ValueError, match=re.escape(message)):
            SoftTokenGRPOConfig("run", max_completion_length=5, generation_kwargs={name: value}, bf16=False)


def test_sizes_of_a_wrong_type(engine):
    parts = random_main_model(), tiny_tokenizer()
    for name, value in (("max_new_tokens", 2.5), ("max_new_tokens", "5"), ("batch_size", 2.5), ("batch_size", True)):
        with pytest.raises(ValueError, match=f"`{name}` must be int.*got {value!r}"):
            TransformersEngine(*parts, **{"max_new_tokens": 5, name: value})
    with pytest.raises(ValueError, match="`max_new_tokens` must be int or unset, got 2.5"), engine.limited_to(2.5):
        pass


def test_what_only_sampling_reads_is_refused_without_it():
    with pytest.raises(ValueError, match="sets temperature, top_k, which have no meaning.*do_sample=True"):
        TransformersEngine(random_main_model(), tiny_tokenizer(), 5, {"top_k": 5, "temperature": 0.5})


def test_rows_of_a_cache_are_picked_by_transformers(monkeypatch):
    # It moves their index to each layer's device; with a `device_map` there are several, and none has them all
    asked, reorder = [], DynamicCache.reorder_cache

    def spy(cache, rows):
        asked.append((sys._getframe(1).f_code.co_name, len(rows)))
        reorder(cache, rows)

    monkeypatch.setattr(DynamicCache, "reorder_cache", spy)
    main_model, prompts = often_ending_main_model(), tiny_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    latent_embeds = 2 * torch.randn(17, 3, 64, generator=torch.Generator().manual_seed(0))
    engine = TransformersEngine(main_model, tiny_tokenizer(), max_new_tokens=12)
    engine.generate(ids_of(PROMPTS), latent_embeds, torch.tensor([9, 0, 8]))
    assert asked[0] == ("__init__", 17) and asked[1][0] == "_keep"  # after the questions, and when rows have ended
    with torch.no_grad():
        Thinker(ThinkingConfig(num_latents=2), tiny_tokenizer(), len(VOCABULARY)).think(main_model, *prompts.values())
    policy = LatentPolicyModel.from_assistant(fresh_layers(main_model, 1), main_model, tiny_tokenizer())
    policy.sample(**prompts, num_samples=2)
    assert asked[-2:] == [("think", 3), ("_read_question", 6)]


# ---- Stop strings ----


@pytest.mark.parametrize("batch_size", [None, 2])
def test_stop_strings_end_rows(batch_size):
    main_model, tokenizer, latent_embeds = often_ending_main_model(), tiny_tokenizer(), 2 * torch.randn(9, 3, 64)
    num_samples = torch.tensor([4, 2, 3])
    plain = TransformersEngine(main_model, tokenizer, 12)
    whole = plain.generate(ids_of(PROMPTS), latent_embeds, num_samples)
    texts = [[tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1)] for ids in whole]
    pairs = [tokenizer.decode(ids[n : n + 2]) for ids in whole for n in range(len(ids) - 2)]
    stop = next(pair for pair in pairs if any(pair not in text[-1] for text in texts))  # not in all of them
    engine = TransformersEngine(main_model, tokenizer, 12, {"stop_strings": stop}, batch_size)
    completions = engine.generate(ids_of(PROMPTS), latent_embeds, num_samples)
    rows = torch.arange(3).repeat_interleave(num_samples).tolist()
    for row, ids, before, text, embeds in zip(rows, completions, whole, texts, latent_embeds, strict=True):
        has_stop = stop in text[-1]
        assert ids == (before[: 1 + [stop in part for part in text].index(True)] if has_stop else before)
        assert engine.is_finished(ids) == (has_stop or 1 in before)
        assert "".join(engine.stream(ids_of(PROMPTS)[row], embeds[None])) == engine.decode([ids])[0]


def test_rows_that_a_stop_string_has_ended_are_decoded_no_further():
    main_model = random_main_model()
    engine = TransformersEngine(main_model, tiny_tokenizer(), 12, {"stop_strings": list(VOCABULARY)})
    num_passes, forward = [], main_model.forward
    main_model.forward = lambda *args, **kwargs: num_passes.append(1) or forward(*args, **kwargs)
    completions = engine.generate(ids_of(PROMPTS), torch.randn(3, 2, 64))
    assert [len(ids) for ids in completions] == [1, 1, 1] and len(num_passes) == 1
    assert engine.num_truncated == 0
    with engine.limited_to(1):  # a row that ends at the limit was not cut off by it
        engine.generate(ids_of(PROMPTS), torch.randn(3, 2, 64))
    assert engine.num_truncated == 0


def byte_tokenizer():
    """A token for every byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", extra_special_tokens=["<stop>"])


def test_a_stop_string_may_be_part_of_a_token_or_many():
    tokenizer = byte_tokenizer()
    text = "naïve\n\nQ: 3é<stop>4"
    ids = tokenizer(text)["input_ids"]
    for stop, end in (
        ("ï", "naï"),
        ("\n\nQ", "naïve\n\nQ"),
        ("é", "naïve\n\nQ: 3é"),
        ("<stop>", text[:-1]),
        ("ve", "naïve"),
    ):
        stop_strings = StopStrings(stop, tokenizer)
        assert tokenizer.decode(stop_strings.cut(ids)) == end
        lengths = [n for n in range(1, len(ids) + 1) if stop_strings(torch.tensor([ids[:n]]), None).item()]
        assert lengths[0] == len(stop_strings.cut(ids))
    none = StopStrings(["x", "4<stop>"], tokenizer)
    assert none.cut(ids) == ids and not none.are_in(ids)
    for bad in ([""], [], [5], 5):
        with pytest.raises(ValueError, match=r"stop_strings.*at least one text that is not empty, got [\[5]"):
            StopStrings(bad, tokenizer)


# ---- Text ----


def test_special_tokens_are_part_of_the_text_but_for_those_of_control():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<answer>", "</answer>"], "bos_token": "<bos>"})
    main_model = random_main_model(vocab_size=len(tokenizer))
    engine = TransformersEngine(main_model, tokenizer, max_new_tokens=12)
    engine.eos_token_ids.append(tokenizer.convert_tokens_to_ids("A"))  # an end that is no special token
    ids = [*tokenizer("<answer>3</answer>")["input_ids"], tokenizer.eos_token_id]
    with_control = [tokenizer.bos_token_id, tokenizer.pad_token_id, *ids, tokenizer.convert_tokens_to_ids("A")]
    assert engine.decode([ids, with_control]) == ["<answer> 3 </answer>"] * 2


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
    with pytest.raises(
        ValueError, match="60 tokens.*num_latents=3.*12 new tokens.*`max_new_tokens` of a reasoner.*64 positions"
    ):
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
