# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What reward functions read, and where a completion ends: in training as in evaluation."""

import itertools

import pytest
import torch
from datasets import Dataset

from tests.tiny import VOCABULARY, random_main_model, tiny_tokenizer
from tests.trainer.test_arguments import ON_CPU, TRAINERS
from tests.trainer.test_inputs import make_trainer
from tests.trainer.test_latent_grpo_trainer import history
from trl_dlr import CoconutSFTTrainer, LatentGRPOConfig, LatentGRPOTrainer, LatentSFTTrainer, SoftTokenGRPOTrainer
from trl_dlr.experimental.latent_rl import LatentRLTrainer
from trl_dlr.rewards import get_tag_format_reward


ONE_BY_ONE = [LatentGRPOTrainer, SoftTokenGRPOTrainer, LatentRLTrainer]
TAGS = ["<answer>", "</answer>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
pytestmark = pytest.mark.filterwarnings("ignore:`LatentRLTrainer` is experimental")


def tokenizer_with_tags(response_template=None):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"extra_special_tokens": TAGS})
    tokenizer.response_template = response_template
    return tokenizer


def a_model_that_answers(tokenizer, text):
    """A model that writes `text` whatever it is asked: each token is followed by the next."""
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    model = random_main_model(vocab_size=len(tokenizer), max_position_embeddings=128)
    following, forward = dict(itertools.pairwise(ids)), model.forward

    def writing(*args, **kwargs):
        output = forward(*args, **kwargs)
        given = kwargs.get("input_ids")
        last = None if given is None or given.size(1) == 0 else given[:, -1]
        wanted = [ids[0]] * len(output.logits) if last is None else [following.get(i, ids[0]) for i in last.tolist()]
        output.logits = output.logits.clone()
        output.logits[torch.arange(len(wanted)), -1, wanted] += 1000
        return output

    model.forward = writing
    return model


@pytest.mark.parametrize("kind", ["text", "chat", "response_template"])
def test_tags_that_are_special_tokens_reach_the_rewards_in_training_as_in_evaluation(tmp_path, kind):
    has_template = kind == "response_template"
    tokenizer = tokenizer_with_tags({"fields": {}, "start_anchor": "<answer>"} if has_template else None)
    main_model = a_model_that_answers(tokenizer, "<answer>3</answer>")
    prompt = "A12" if kind == "text" else [{"role": "user", "content": "A12"}]
    rows = [{"prompt": prompt, "answer": "3"}] * 4
    seen = []

    def reward(completions, **kwargs):
        seen.append(completions)
        return get_tag_format_reward(["answer"])(completions)

    trainer = LatentGRPOTrainer(
        model=random_main_model(seed=1, vocab_size=len(tokenizer)),
        main_model=main_model,
        reward_funcs=reward,
        args=LatentGRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_completion_length=8,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            **TRAINERS[LatentGRPOTrainer][1],
            **ON_CPU,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        main_processing_class=tokenizer,
    )
    trainer.train()
    text = "<answer> 3 </answer>"
    assert seen[0] == [text if kind == "text" else [{"role": "assistant", "content": text}]] * 4
    assert history(trainer, "reward") == [1.0]
    with trainer.answering() as reasoner:
        assert reasoner.generate([prompt]).texts == [text]


@pytest.mark.parametrize("trainer_class", ONE_BY_ONE)
def test_special_tokens_reach_the_rewards_of_all_trainers(trainer_class, tmp_path):
    tokenizer, seen = tokenizer_with_tags(), []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    trainer = make_trainer(trainer_class, tmp_path, Dataset.from_list([{"prompt": "A12"}] * 4), max_steps=1)
    ids = [*tokenizer("<answer>3</answer>")["input_ids"], tokenizer.eos_token_id]
    trainer.reward_funcs[0] = reward
    for name in ("processing_class", "_tokenizer", "main_processing_class"):
        if hasattr(trainer, name):
            setattr(trainer, name, tokenizer)
    if trainer_class is LatentGRPOTrainer:
        trainer.engine.processing_class = tokenizer
        trainer.engine._decode = lambda prompt_ids, rows, *latents: [list(ids)] * len(rows)
    else:
        trainer.thinker.answer = lambda model, prompt_ids, *args: torch.tensor([ids] * len(prompt_ids))
        trainer.model.resize_token_embeddings(len(tokenizer))
    trainer.train()
    assert set(seen) == {"<answer> 3 </answer>"}


@pytest.mark.parametrize("trainer_class", ONE_BY_ONE)
def test_a_row_that_a_stop_string_has_ended_is_finished_and_not_truncated(trainer_class, tmp_path):
    # Every token but one is a stop string: rows end at once, or are cut off
    kept, lengths = "7", []

    def reward(completions, **kwargs):
        lengths.extend(len(text.split()) for text in completions)
        return [float(sum(map(ord, text)) % 7) for text in completions]

    stop_strings = [token for token in VOCABULARY if token != kept]
    kwargs = {"mask_truncated_completions": True} if trainer_class is not LatentRLTrainer else {}
    trainer = make_trainer(
        trainer_class,
        tmp_path,
        Dataset.from_list([{"prompt": f"A{i}2"} for i in range(4)]),
        generation_kwargs={"stop_strings": stop_strings},
        max_completion_length=3,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        **kwargs,
    )
    trainer.reward_funcs[0] = reward
    outputs, score = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: outputs.append(score(inputs)) or outputs[-1]
    trainer.train()
    assert set(lengths) <= {0, 1} and set(history(trainer, "completions/clipped_ratio")) == {0.0}
    for output in outputs:
        assert output["completion_mask"].any(dim=1).all()  # none is masked as truncated
        if trainer_class is SoftTokenGRPOTrainer:
            # [2 latents, the token, and the end that it was given, unless it is the end itself]
            ended = output["completion_ids"][:, 2] == 1
            assert (output["completion_mask"] * output["tool_mask"]).sum(1).eq(3).all()
            assert (output["completion_mask"].sum(1) == 4 - ended.int()).all()
    losses = history(trainer, "loss")
    assert len(losses) == 2 and all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("trainer_class", [LatentSFTTrainer, CoconutSFTTrainer, SoftTokenGRPOTrainer])
def test_the_generation_configuration_of_a_model_does_not_decide(trainer_class, tmp_path):
    rows = Dataset.from_list(
        [{"prompt": f"A{i}2", "answer": "3", "completion": "=3", "steps": ["1"]} for i in range(4)]
    )
    results = []
    for settings in ({}, {"suppress_tokens": list(range(3, 13)), "no_repeat_ngram_size": 1, "num_beams": 2}):
        trainer = make_trainer(trainer_class, tmp_path, rows, eval_dataset=rows, max_completion_length=8)
        model = getattr(trainer, "main_model", trainer.model)
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        torch.manual_seed(0)
        if trainer_class is CoconutSFTTrainer:
            results.append(trainer._answer(trainer.eval_dataset))
        elif trainer_class is LatentSFTTrainer:
            with trainer.answering() as reasoner:
                results.append(reasoner.generate(list(rows["prompt"])).texts)
        else:
            results.append(trainer._generate(list(rows["prompt"]))[1])
    assert results[0] == results[1]
