# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import logging
import re

import pytest

from tests.tiny import VOCABULARY, random_main_model, tiny_dataset, tiny_reward, tiny_tokenizer
from trl_dlr import LatentPolicyModel, LatentReasoner, fresh_layers
from trl_dlr.evaluation import evaluate_latents
from trl_dlr.evaluation.controls import CONTROLS
from trl_dlr.evaluation.table import evaluate_row, interval, print_table
from trl_dlr.generation import TransformersEngine


@pytest.mark.parametrize("values", [[0.125, 0.25], [0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.5], [0.0, 1.0], [0.3]])
@pytest.mark.parametrize("num_questions", [1, 8, 36])
def test_an_interval_lies_between_0_and_1_and_has_a_width(values, num_questions):
    found = interval(values, num_questions)
    assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1
    assert found["high"] - found["low"] > 0.05
    assert found["runs"] == values and found["num_questions"] == num_questions


def row(reasoner, control, seeds=(0, 1), k=2):
    return evaluate_row(reasoner, tiny_dataset(6, 0), tiny_reward, control, list(seeds), 2, k, 4)


@pytest.fixture(scope="module")
def reasoner():
    main_model, tokenizer = random_main_model(), tiny_tokenizer()
    policy = LatentPolicyModel.from_assistant(fresh_layers(main_model, 1), main_model, tokenizer)
    return LatentReasoner(policy, tokenizer, TransformersEngine(main_model, tokenizer, 3), tokenizer)


def test_the_table_says_what_its_rows_and_columns_are(reasoner, capsys):
    print_table(
        {
            "policy": row(reasoner, "policy"),
            "shuffled": row(reasoner, "shuffled"),
            "no_latents": row(reasoner, "no_latents"),
        }
    )
    table, legend = capsys.readouterr().out.strip("\n").split("\n\n")
    assert len(table.splitlines()) == 4 and len({len(line) for line in table.splitlines()}) == 1
    for name in ("policy", "shuffled", "no_latents", "pass@1", "pass@2", "majority@2", "truncated"):
        assert re.search(rf"^{name} +\w", legend, flags=re.MULTILINE), name
    assert "mean_latents" not in legend and "the kind of these 6" in legend.splitlines()[-1]


def test_answers_that_were_all_cut_off_are_warned_of(reasoner, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, "trl_dlr"), reasoner.engine.limited_to(1):
        monkeypatch.setattr(reasoner.engine, "eos_token_ids", list(VOCABULARY.values()))  # any token ends an answer
        assert row(reasoner, "policy")["truncated"] == 0.0 and not caplog.records
        monkeypatch.setattr(reasoner.engine, "eos_token_ids", [])  # and none
        assert row(reasoner, "policy")["truncated"] == 1.0
        evaluate_latents(reasoner, tiny_dataset(6, 0), tiny_reward, control="no_latents", description="Alone")
    messages = [record.getMessage() for record in caplog.records]
    names = [re.search(r"(policy, seed \d|Alone): all", message).group(1) for message in messages]
    assert names == ["policy, seed 0", "policy, seed 1", "Alone"]
    assert "all 12 answers were cut off at 1 tokens" in messages[0] and "`max_new_tokens`" in messages[0]


def test_a_data_set_without_questions_is_refused(reasoner):
    for control in CONTROLS:
        with pytest.raises(ValueError, match="`dataset` must hold at least one question"):
            evaluate_latents(reasoner, tiny_dataset(6, 0).select([]), tiny_reward, control=control)
