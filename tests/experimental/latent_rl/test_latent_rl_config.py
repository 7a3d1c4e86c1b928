# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest

from trl_dlr.experimental.latent_rl import LatentRLConfig


def make_config(tmp_path, **kwargs):
    return LatentRLConfig(str(tmp_path), **{"use_cpu": True, "bf16": False, "report_to": "none", **kwargs})


def test_defaults_are_of_hidden_states(tmp_path):
    config = make_config(tmp_path)
    assert config.thinking_config().latent_type == "hidden_states"
    assert (config.pos_weight, config.num_generations, config.lr_scheduler_type) == (20.0, 2, "constant")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"latent_type": "soft_tokens"}, "`latent_type` must be 'hidden_states'"),
        ({"latent_type": "words"}, "`latent_type` must be one of"),
        ({"num_latents": 0}, "`num_latents` must be at least 1, got 0"),
        ({"pos_weight": 0.0}, "`pos_weight` must be a positive number, got 0.0"),
        ({"pos_weight": float("nan")}, "`pos_weight` must be a positive number, got nan"),
        ({"value_learning_rate": -1.0}, "`value_learning_rate` must be a positive number"),
        ({"value_warmup_steps": 0}, "`value_warmup_steps` must be at least 1, got 0"),
        ({"hacking_window": -1}, "`hacking_window` must be a number of at least 0"),
        ({"hacking_threshold": float("inf")}, "`hacking_threshold` must be a number of at least 0"),
        ({"stop_at_end_marker": True, "end_marker": "="}, "`stop_at_end_marker=True` has no meaning"),
        ({"noise_scale": 0.5}, "`noise_scale=0.5` has no meaning for `latent_type='hidden_states'`"),
        ({"max_redraws": 2}, "`max_redraws=2` has no meaning for `LatentRLTrainer`: accuracy, and the labels"),
        ({"mixture_size": 4, "min_candidates": 4}, "`mixture_size=4` has no meaning"),
        ({"soft_token_score": "exact"}, "`soft_token_score='exact'` has no meaning"),
        ({"invalid_samples": "exclude"}, "`invalid_samples='exclude'` has no meaning"),
        ({"beta": 0.1}, "`beta=0.1` has no meaning for `LatentRLTrainer`: the loss is the value head's score"),
        ({"loss_type": "grpo"}, "`loss_type='grpo'` has no meaning"),
        ({"use_vllm": True}, "`use_vllm=True` has no meaning"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError) as error:
        make_config(tmp_path, **kwargs)
    assert message in str(error.value)


def test_the_best_checkpoint_is_not_chosen_by_the_losses_of_two_phases(tmp_path):
    kwargs = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}
    config = make_config(tmp_path, save_strategy="steps", **kwargs)
    assert config.metric_for_best_model == "value/accuracy" and config.greater_is_better
    kwargs["metric_for_best_model"] = "loss"
    assert make_config(tmp_path, save_strategy="steps", **kwargs).metric_for_best_model == "loss"
