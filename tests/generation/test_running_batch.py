# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import math

import pytest
import torch

from tests.families import FAST, NUM_WORDS, tiny_family
from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr.generation import TransformersEngine
from trl_dlr.generation.running_batch import DecodingRow, RunningBatch, rows_can_join
from trl_dlr.generation.text import StopStrings
from trl_dlr.models.architectures import UNFIT_FAMILIES


NEW_TOKENS = 14


def running(
    engine: TransformersEngine, prompts, rows, latents=None, **kwargs
) -> tuple[RunningBatch, list[DecodingRow]]:
    made = [DecodingRow(NEW_TOKENS, **kwargs) for _ in rows]
    batch = engine.batch(prompts, rows, latents)
    return RunningBatch(engine.model, engine.generation_kwargs, batch, made), made


@pytest.mark.parametrize("family", sorted(FAST))
@torch.no_grad()
def test_rows_that_join_are_what_they_are_alone(family):
    model = tiny_family(family)
    if model.config.get_text_config().model_type in UNFIT_FAMILIES or not rows_can_join(model):
        pytest.skip("its rows cannot join others, or it is refused")
    engine = TransformersEngine(model, tiny_tokenizer(), NEW_TOKENS)
    generator = torch.Generator().manual_seed(1)
    width = model.get_input_embeddings()(torch.tensor([3])).size(1)

    def prompt(length):
        return torch.randint(3, NUM_WORDS, (length,), generator=generator).tolist()

    # A short one joins a long one and a long one a short one; one has no latents, another several trajectories
    asked = []
    for lengths, rows, num_latents in (([12, 3], [0, 1, 1], 2), ([20], [0, 0], 3), ([4], [0], 0), ([2], [0], 1)):
        latents = [torch.randn(num_latents, width, generator=generator) for _ in rows] if num_latents else None
        asked.append(([prompt(length) for length in lengths], rows, latents))
    alone = []
    for prompts, rows, latents in asked:
        for index, row in enumerate(rows):
            embeds = None if latents is None else latents[index][None]
            alone += engine.generate([prompts[row]], embeds, None if embeds is None else torch.tensor([1]))
    batch, rows = running(engine, *asked[0])
    batch.advance(lambda: True)
    for each in asked[1:]:
        other, added = running(engine, *each)
        other.advance(lambda: True)
        if len(batch) > 0 and len(other) > 0:
            batch.join(other)
        elif len(other) > 0:
            batch = other
        rows += added
        tokens = len(rows[0].completion_ids)
        if len(batch) > 0:
            batch.advance(lambda: len(rows[0].completion_ids) >= tokens + 3)
    while len(batch) > 0:
        batch.advance()
    assert [row.completion_ids for row in rows] == alone


def begun(engine: TransformersEngine, prompt: list[int]) -> RunningBatch:
    batch, _ = running(engine, [prompt], [0])
    batch.advance(lambda: True)
    return batch


@torch.no_grad()
def test_positions_that_only_rows_that_left_had_needed_are_given_up():
    engine = TransformersEngine(random_main_model(max_position_embeddings=512), tiny_tokenizer(), NEW_TOKENS)
    batch = begun(engine, [5] * 100)
    batch.join(begun(engine, [6] * 4))
    assert batch.mask.size(1) == 101
    batch.rows[0].has_ended = True
    batch.advance(lambda: True)
    batch.join(begun(engine, [7] * 5))
    assert len(batch) == 2 and batch.mask.size(1) < 10
    assert batch.cache.get_seq_length() == batch.mask.size(1) - 1


@torch.no_grad()
def test_a_batch_that_is_never_empty_does_not_grow():
    engine = TransformersEngine(random_main_model(), tiny_tokenizer(), NEW_TOKENS)
    batch = begun(engine, [5] * 4)
    for _ in range(8):  # each beside the one before
        batch.advance(lambda: True)
        for row in batch.rows[:-1]:
            row.has_ended = True
        batch.join(begun(engine, [6] * 4))
        batch.advance(lambda: True)
    longest = max(len(row.completion_ids) for row in batch.rows)
    assert batch.completion_ids.size(1) == longest < 8
    for row, ids in zip(batch.rows, batch.completion_ids.tolist(), strict=True):
        assert ids[-len(row.completion_ids) :] == row.completion_ids


@torch.no_grad()
def test_each_row_has_limits_and_stop_strings_of_its_own():
    engine = TransformersEngine(random_main_model(), tiny_tokenizer(), NEW_TOKENS)
    whole = engine.generate([[5, 6, 7]])[0]
    text = engine.processing_class.decode(whole, skip_special_tokens=False)
    seen = []
    rows = [
        DecodingRow(3, on_token=seen.append),
        DecodingRow(NEW_TOKENS),
        DecodingRow(NEW_TOKENS, StopStrings(text.split()[1], engine.processing_class)),
    ]
    batch = RunningBatch(engine.model, engine.generation_kwargs, engine.batch([[5, 6, 7]], [0, 0, 0]), rows)
    while len(batch) > 0:
        batch.advance()
    assert rows[0].completion_ids == whole[:3] == seen
    assert rows[1].completion_ids == whole
    assert rows[2].completion_ids == whole[: len(rows[2].completion_ids)] and len(rows[2].completion_ids) <= 2


@torch.no_grad()
def test_rows_are_sampled_at_their_temperature_each_from_its_own_generator():
    engine = TransformersEngine(random_main_model(), tiny_tokenizer(), 1)
    logits = engine.model(torch.tensor([[5, 6, 7]])).logits[0, -1].double()
    expected = (logits / 0.7).softmax(0)
    rows = [DecodingRow(1, temperature=0.7, generator=torch.Generator().manual_seed(seed)) for seed in range(4000)]
    batch = RunningBatch(engine.model, engine.generation_kwargs, engine.batch([[5, 6, 7]], [0] * len(rows)), rows)
    batch.advance()
    counts = torch.bincount(torch.tensor([row.completion_ids[0] for row in rows]), minlength=len(logits))
    for share, probability in zip((counts / len(rows)).tolist(), expected.tolist(), strict=True):
        assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / len(rows)) + 1e-3
    # The same row alone, and beside a greedy one
    again = DecodingRow(1, temperature=0.7, generator=torch.Generator().manual_seed(17))
    greedy = DecodingRow(1)
    batch = RunningBatch(engine.model, engine.generation_kwargs, engine.batch([[5, 6, 7]], [0, 0]), [greedy, again])
    batch.advance()
    assert again.completion_ids == rows[17].completion_ids
    assert greedy.completion_ids == [int(logits.argmax())]
