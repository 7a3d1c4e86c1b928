# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3NextConfig, Qwen3NextForCausalLM
from trl.trainer.utils import add_fused_lm_head

from tests.tiny import VOCABULARY, random_main_model
from trl_dlr.models.hidden_thoughts import add_hidden_thoughts, read_with_thoughts


# "." a token, "T" a latent, "_" padding
MIXED = ["..TT....", "____..TT", "__.TTT..", "___.....", "..T..T._"]
ALIGNED = ["__..TT..", "...TTT._", "_...TT.."]


def gpt2():
    torch.manual_seed(0)  # absolute positions: padding must not move them
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(VOCABULARY), bos_token_id=None, eos_token_id=1, **sizes)).eval()


def recurrent():
    torch.manual_seed(0)  # one layer of linear attention, one of full
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }
    sizes |= {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    sizes |= {"linear_value_head_dim": 8, "num_experts": 0, "mlp_only_layers": [0, 1]}
    return Qwen3NextForCausalLM(Qwen3NextConfig(vocab_size=len(VOCABULARY), **sizes)).eval()


def batch_of(rows):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(VOCABULARY), (len(rows), len(rows[0])), generator=generator)
    mask = torch.tensor([[int(c != "_") for c in row] for row in rows])
    is_latent = torch.tensor([[c == "T" for c in row] for row in rows])
    return ids.masked_fill(mask == 0, 0), mask, is_latent


def logits_of(model, ids, mask, is_latent, **kwargs):
    hidden = read_with_thoughts(model.base_model, ids, mask, is_latent, **kwargs).last_hidden_state
    return model.get_output_embeddings()(hidden)


def naive_logits(model, ids, mask, is_latent):
    """Each row on its own, without padding and cache: a whole forward for each latent."""
    rows = []
    for row_ids, is_there, latents in zip(ids, mask.bool(), is_latent, strict=True):
        embeds = list(model.get_input_embeddings()(row_ids[is_there]))
        for place in latents[is_there].nonzero().flatten().tolist():
            output = model(inputs_embeds=torch.stack(embeds)[None], output_hidden_states=True, use_cache=False)
            embeds[place] = output.hidden_states[-1][0, place - 1]
        rows.append(model(inputs_embeds=torch.stack(embeds)[None], use_cache=False).logits[0])
    return rows


def gradients(model, rows):
    """Of a fixed mixture of logits."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    sum((row * torch.randn(row.shape, generator=generator)).sum() for row in rows).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal_to_naive(model, rows):
    batch = batch_of(rows)
    logits = logits_of(model, *batch)
    ours = [row[is_there] for row, is_there in zip(logits, batch[1].bool(), strict=True)]
    theirs = naive_logits(model, *batch)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-4)
    ours, theirs = gradients(model, ours), gradients(model, theirs)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-4, rtol=1e-3, msg=lambda text: f"{name}: {text}")
    return ours


@pytest.mark.parametrize("make", [random_main_model, gpt2, recurrent])
@pytest.mark.parametrize("rows", [MIXED, ALIGNED], ids=["mixed", "aligned"])
def test_it_equals_a_whole_forward_for_each_latent(make, rows):
    check_equal_to_naive(make(), rows)


def test_it_does_so_under_activation_checkpointing():
    model = random_main_model()
    plain = check_equal_to_naive(model, MIXED)
    model.gradient_checkpointing_enable()
    model.train()
    checkpointed = check_equal_to_naive(model, MIXED)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=2e-4, rtol=1e-3)


def test_a_row_of_a_batch_is_as_it_is_alone():
    model, batch = random_main_model(), batch_of(MIXED)
    together = logits_of(model, *batch)
    for row, is_there in enumerate(batch[1].bool()):
        alone = logits_of(model, *(tensor[row : row + 1] for tensor in batch))
        torch.testing.assert_close(together[row, is_there], alone[0, is_there], atol=1e-5, rtol=1e-4)


def test_gradient_flows_through_latents():
    ids, mask, is_latent = batch_of(["..TT.."])
    model, seen = random_main_model(), []

    def keep(module, args, output):
        output.retain_grad()
        seen.append(output)

    model.model.norm.register_forward_hook(keep)
    logits_of(model, ids, mask, is_latent)[:, 4:].sum().backward()
    # The last state of the first pass is the first latent, and nothing that is summed is read off it
    assert seen[0].grad[0, -1].abs().sum() > 0


def test_what_is_before_the_first_latent_is_read_once():
    model = random_main_model()
    lengths = []
    read = model.model.layers[0].forward
    model.model.layers[0].forward = lambda states, **kwargs: (lengths.append(states.size(1)), read(states, **kwargs))[
        1
    ]
    logits_of(model, *batch_of(["....TTT..."]))
    assert lengths == [4, 1, 1, 4]


def test_without_latents_it_is_the_model_itself():
    model, (ids, mask, is_latent) = random_main_model(), batch_of(["........", "__......"])
    logits = logits_of(model, ids, mask, is_latent)
    expected = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [random_main_model, gpt2])
def test_a_model_with_thoughts_is_called_as_before(make):
    model, batch = make(), batch_of(ALIGNED)
    names = ("input_ids", "attention_mask", "is_latent")
    expected, plain = logits_of(model, *batch), model(batch[0]).logits
    add_fused_lm_head(model)
    add_hidden_thoughts(model)
    assert torch.equal(model(batch[0]).logits, plain)
    given = dict(zip(names, batch, strict=True))
    torch.testing.assert_close(model(**given).logits, expected)
    labels = batch[0].masked_fill(batch[1] == 0, -100)
    fused = model(**given, labels=labels, fused_lm_head=True).log_probs
    log_probs = expected[:, :-1].log_softmax(-1).gather(-1, batch[0][:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(fused, log_probs.masked_fill(labels[:, 1:] == -100, 0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [random_main_model, gpt2, recurrent])
def test_hidden_states_of_all_layers_are_those_of_the_whole_sequence(make):
    model, batch = make(), batch_of(ALIGNED)
    add_hidden_thoughts(model)
    names = ("input_ids", "attention_mask", "is_latent")
    output = model(**dict(zip(names, batch, strict=True)), output_hidden_states=True, logits_to_keep=1)
    assert output.logits.size(1) == 1 and len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert {states.shape[:2] for states in output.hidden_states} == {batch[0].shape}
    expected = read_with_thoughts(model.base_model, *batch).last_hidden_state
    torch.testing.assert_close(output.hidden_states[-1], expected, atol=0, rtol=0)


@pytest.mark.parametrize("row", ["T...", "__T."])
def test_a_latent_without_a_token_before_it_is_refused(row):
    with pytest.raises(ValueError, match="`is_latent` has a latent that is a row's first position"):
        logits_of(random_main_model(), *batch_of(["....", row]))
