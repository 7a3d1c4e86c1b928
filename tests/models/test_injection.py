# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest
import torch

from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr.models import LatentInjector


def fitted(injection, latent_dim=8, num_latents=5, scale=0.3, anchor_text="A1="):
    main_model = random_main_model()
    injector = LatentInjector(latent_dim, num_latents, 64, injection, scale)
    injector.fit(main_model, tiny_tokenizer(), anchor_text)
    return injector, main_model.get_input_embeddings().weight.detach()


@pytest.mark.parametrize(
    ("injection", "latent_dim"), [("anchors", 8), ("components", 8), ("trained", 8), ("anchors", 64), ("anchors", 256)]
)
def test_latents_of_unit_variance_have_the_asked_size(injection, latent_dim):
    injector, table = fitted(injection, latent_dim, scale=0.7)
    moved = injector(torch.randn(4000, 5, latent_dim)) - injector(torch.zeros(1, 5, latent_dim))
    rms = table.square().mean().sqrt()
    torch.testing.assert_close(moved.square().mean().sqrt(), 0.7 * rms, rtol=0.02, atol=0)


def test_anchors_are_the_texts_tokens_in_turn():
    injector, table = fitted("anchors")
    ids = tiny_tokenizer()("A1=A1")["input_ids"]
    torch.testing.assert_close(injector(torch.zeros(1, 5, 8))[0], table[ids])


def test_components_span_what_varies_most_in_the_embedding_table():
    injector, table = fitted("components")
    _, _, right = torch.linalg.svd(table - table.mean(0), full_matrices=False)
    ours = torch.nn.functional.normalize(injector.weight.detach(), dim=-1)
    torch.testing.assert_close((ours @ right[:8].T).square().sum(), torch.tensor(8.0), atol=1e-3, rtol=0)


def test_only_a_trained_projection_has_parameters():
    assert [name for name, _ in fitted("trained")[0].named_parameters()] == ["weight"]
    assert not list(fitted("anchors")[0].parameters()) and not list(fitted("components")[0].parameters())


def test_an_anchor_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="anchor_text.*''.*tokenizes to nothing"):
        fitted("anchors", anchor_text="")
