# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What families of models do differently, one by one. All of them in every role: test_families.py."""

import pytest
import torch
from accelerate import disk_offload
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaModel

from tests.families import tiny_family
from tests.models.test_families import PROMPTS, engine_of, llama, tokenizer
from trl_dlr import LatentPolicyModel, first_layers, fresh_layers
from trl_dlr.generation import TransformersEngine
from trl_dlr.models.architectures import check_family, ready_to_generate, text_backbone
from trl_dlr.models.main_model import completion_log_probs


def policy_of(assistant, main_model, **kwargs):
    torch.manual_seed(0)
    options = {"num_latents": 3, "latent_dim": 4, "anchor_text": "40 41", **kwargs}
    return LatentPolicyModel.from_assistant(assistant, main_model, tokenizer(), **options).eval()


def test_layers_that_are_no_model_of_their_own_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`num_layers` must be at least 3 for this nemotron_h model.*got 2"):
        fresh_layers(tiny_family("nemotron_h"), 2)
    gemma = tiny_family("gemma4_text")
    last = gemma.config.layer_types.index("full_attention")
    with pytest.raises(ValueError, match=rf"`num_layers={last}` layers of this gemma4_text.*last layer"):
        first_layers(gemma, last)
    first_layers(gemma, last + 1)
    offloaded = disk_offload(tiny_family("llama"), tmp_path)
    for make in (first_layers, fresh_layers):
        with pytest.raises(ValueError, match="`main_model` has weights that are offloaded"):
            make(offloaded, 2)
    with pytest.raises(ValueError, match=r"`main_model` is of the family rwkv, .*cache of its own"):
        fresh_layers(tiny_family("rwkv"), 1)


def test_layers_attend_as_the_main_model_does():
    wrapper = tiny_family("gemma3")
    assert first_layers(wrapper, 2).config._attn_implementation == "sdpa"
    wrapper.set_attn_implementation("eager")
    assert first_layers(wrapper, 2).config._attn_implementation == "eager"


def test_lists_with_an_entry_for_each_layer_are_cut():
    jamba = first_layers(tiny_family("jamba"), 2)
    assert (jamba.config.num_hidden_layers, len(jamba.config.layer_types), len(jamba.layers)) == (2, 2, 2)
    gemma = tiny_family("gemma3n_text")
    config = first_layers(gemma, 2).config
    assert (len(config.layer_types), config.num_kv_shared_layers, len(config.activation_sparsity_pattern)) == (2, 0, 2)
    of_all = gemma.model.embed_tokens_per_layer.weight
    assert torch.equal(first_layers(gemma, 2).embed_tokens_per_layer.weight, of_all[:, : of_all.size(1) // 2])


@pytest.mark.parametrize("family", ["gemma4_text", "gemma3n_text"])
def test_latents_at_their_anchors_are_the_anchor_tokens(family):
    """In every layer that reads tokens again, too; and elsewhere the padding token stands for latents."""
    main_model = tiny_family(family)
    policy = policy_of(llama(), main_model)
    assert policy.config.anchor_ids == [40, 41, 40]
    embeds = policy.inject(policy.zero_latents(2).latents)
    tokens, completions = [prompt + [40, 41, 40] for prompt in PROMPTS], [[30, 31], [32, 33, 34]]
    expected, _ = completion_log_probs(main_model, tokens, completions)
    got, _ = completion_log_probs(main_model, PROMPTS, completions, embeds, latent_ids=policy.config.anchor_ids)
    others, _ = completion_log_probs(main_model, PROMPTS, completions, embeds)
    for row in range(2):
        torch.testing.assert_close(got[row], expected[row], atol=1e-4, rtol=1e-4)
        assert (others[row] - expected[row]).abs().max() > 1e-3
    engine = engine_of(main_model)
    assert engine.generate(PROMPTS, embeds, latent_ids=policy.config.anchor_ids) == engine.generate(tokens)
    streamed = "".join(engine.stream(PROMPTS[0], embeds[:1], latent_ids=policy.config.anchor_ids))
    assert streamed == engine.decode(engine.generate(tokens[:1]))[0]


def test_components_have_no_anchors(tmp_path):
    policy = policy_of(llama(), tiny_family("gemma4_text"), injection="components", anchor_text="Answer: ")
    assert policy.config.anchor_ids is None
    policy.save_pretrained(tmp_path)
    assert LatentPolicyModel.from_pretrained(tmp_path).config.anchor_ids is None


def test_latents_are_fed_in_the_size_that_the_assistant_reads_tokens_in():
    gemma = tiny_family("gemma2")
    sizes = {}
    for name, assistant in {"gemma": gemma, "llama": llama()}.items():
        embed = assistant.get_input_embeddings()
        of_tokens = embed(torch.arange(64)).square().mean().sqrt()
        policy = policy_of(assistant, gemma, latent_dim=16)
        sizes[name] = policy._feed(torch.randn(64, 3, 16)).square().mean().sqrt() / of_tokens
    assert all(0.7 < size < 1.4 for size in sizes.values()), sizes


def test_latents_after_a_stop_leave_gradients_finite():
    """Gemma 3n divides by the size of what it reads, and what follows a stop is 0."""
    policy = policy_of(tiny_family("gemma3n_text"), llama(), learn_stop=True)
    ids = torch.tensor([PROMPTS[1]] * 3)
    latents, lengths = torch.randn(3, 3, 4), torch.tensor([1, 2, 3])
    latents = latents.masked_fill((torch.arange(3) >= lengths.unsqueeze(1)).unsqueeze(-1), 0.0)
    output = policy(ids, torch.ones_like(ids), latents=latents, lengths=lengths)
    output.density.log_prob(latents).sum().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert gradients["latent_in.weight"].any()
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []


def test_nothing_is_left_of_a_call_of_generate():
    model = tiny_family("qwen3_5 with images")
    configuration = model.generation_config
    engine = engine_of(model)
    embeds = model.get_input_embeddings()(torch.tensor([[40, 41]] * 5))
    for num_rows in (4, 3, 5):  # Qwen's wrappers keep where images were in the rows of the last call
        completions = engine.generate(PROMPTS[:1], embeds[:num_rows], torch.tensor([num_rows]))
        assert completions == engine.generate([PROMPTS[0] + [40, 41]]) * num_rows
        assert model.model.rope_deltas is None
    wrapper = tiny_family("gemma3")
    with pytest.raises(KeyError), ready_to_generate(wrapper):
        assert wrapper.generation_config is not configuration
        raise KeyError
    assert "prepare_inputs_for_generation" not in vars(wrapper) and isinstance(
        model.generation_config, GenerationConfig
    )


def test_a_wrapper_is_taken_for_its_text():
    wrapper = tiny_family("gemma3")
    policy = policy_of(wrapper, wrapper)
    assert type(policy.assistant) is type(text_backbone(wrapper))
    for name, tensor in text_backbone(wrapper).state_dict().items():
        assert torch.equal(policy.assistant.state_dict()[name], tensor)
    backbone = LlamaModel(
        LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    assert text_backbone(backbone) is backbone


def test_a_hybrid_without_attention_is_refused():
    config = tiny_family("lfm2").config
    config.layer_types = ["conv"] * config.num_hidden_layers
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="`main_model` is of the family lfm2, .*none of its layers has attention"):
        TransformersEngine(model, tokenizer(), 4)
    with pytest.raises(ValueError, match="`assistant` is of the family lfm2, .*none of its layers has attention"):
        policy_of(model, llama())


@pytest.mark.parametrize("argument", ["main_model", "assistant"])
def test_a_refusal_names_family_reason_and_remedy(argument):
    with pytest.raises(ValueError, match=rf"`{argument}` is of the family recurrent_gemma, .*padding.*another family"):
        check_family(tiny_family("recurrent_gemma"), argument)
    assert check_family(llama(), argument) is None
