# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import dataclasses

import pytest
from trl import TrlParser

from trl_dlr import LatentGRPOConfig, LatentPolicyConfig, SoftTokenGRPOConfig
from trl_dlr.experimental.latent_rl import LatentRLConfig


@pytest.mark.parametrize("config_class", [LatentGRPOConfig, SoftTokenGRPOConfig])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss_type": "nope"}, "`loss_type` must be one of grpo, dr_grpo.*got 'nope'"),
        ({"importance_sampling_level": "word"}, "`importance_sampling_level` must be one of token, sequence.*'word'"),
        ({"scale_rewards": "nope"}, "`scale_rewards` must be one of group, batch, none.*'nope'"),
        ({"multi_objective_aggregation": "sum"}, "`multi_objective_aggregation` must be one of.*'sum'"),
        ({"num_iterations": 0}, "`num_iterations` must be at least 1, got 0"),
        ({"num_generations": 0}, "`num_generations` must be at least 2, got 0"),
        ({"steps_per_generation": 0}, "`steps_per_generation` must be at least 1, got 0"),
        ({"epsilon": -1.0}, "`epsilon` must be a number of at least 0, got -1.0"),
        ({"epsilon_high": float("nan")}, "`epsilon_high` must be a number of at least 0, got nan"),
        ({"delta": 0.0}, "`delta` must be a positive number, got 0.0"),
        ({"sapo_temperature_neg": 0.0}, "`sapo_temperature_neg` must be a positive number, got 0.0"),
    ],
)
def test_bad_options_of_trl(tmp_path, config_class, kwargs, message):
    with pytest.raises(ValueError, match=message):
        config_class(str(tmp_path / "run"), bf16=False, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be a positive number, got 0.0"),
        ({"repetition_penalty": -1.0}, "`repetition_penalty` must be a positive number, got -1.0"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, got 0.0"),
        ({"min_p": 2.0}, "`min_p` must be between 0 and 1 or unset, got 2.0"),
        ({"top_k": -1}, "`top_k` must be at least 0"),
    ],
)
def test_bad_options_of_sampling(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        SoftTokenGRPOConfig(str(tmp_path / "run"), bf16=False, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"latent_dim": 0}, "latent_dim.*at least 1.*0"),
        ({"num_latents": 0}, "num_latents.*at least 1.*0"),
        ({"max_completion_length": None}, "max_completion_length.*at least 1.*None"),
        ({"gamma": -0.1}, "gamma.*at least 0.*-0.1"),
        ({"hybrid_coef": -0.1}, "hybrid_coef.*at least 0.*-0.1"),
        ({"hybrid_coef": 0.1, "use_vllm": True}, "hybrid_coef=0.1.*needs gradients through the main model"),
        ({"beta": -0.01}, "beta.*at least 0.*-0.01"),
        ({"beta": float("nan")}, "beta.*at least 0.*nan"),
        ({"contrastive_similarity": "euclid"}, "contrastive_similarity.*dot, cosine, infonce, margin.*euclid"),
        ({"sigma": -1.0}, "sigma.*positive.*-1"),
        ({"injection": "magic"}, "injection.*anchors, components, trained.*magic"),
        ({"latent_sampling": "sideways"}, "latent_sampling.*autoregressive, parallel.*sideways"),
        ({"projection_learning_rate": -1.0}, "projection_learning_rate.*at least 0.*-1"),
        ({"decoding_batch_size": 0}, "decoding_batch_size.*at least 1 or unset.*0"),
        ({"prescreening_fraction": 0.0}, "prescreening_fraction.*above 0 and at most 1.*0.0"),
        ({"prescreening_fraction": 1.5}, "prescreening_fraction.*above 0 and at most 1.*1.5"),
        ({"prescreening_fraction": 0.05}, "prescreening_fraction=0.05.*decodes 1 of.*num_generations=16.*at least 2"),
        ({"prescreening_selection": "best"}, "prescreening_selection.*top_random, top_bottom, top, random.*best"),
        ({"prescreening_warmup_rollouts": -1}, "prescreening_warmup_rollouts.*at least 0.*-1"),
        ({"prescreening_selection": "top"}, "prescreening_selection='top'` needs `prescreening_fraction` below 1"),
        ({"contrastive_similarity": "dot"}, "contrastive_similarity='dot'` needs `gamma` above 0"),
        ({"decoding_batch_size": 4, "use_vllm": True}, "decoding_batch_size=4` needs `use_vllm=False`"),
        ({"initial_stop_prob": 0.1}, "initial_stop_prob=0.1` needs `learn_stop=True`"),
        ({"sync_ref_model": True}, "sync_ref_model=True.*no meaning.*began with"),
        ({"use_bias_correction_kl": False}, "use_bias_correction_kl=False.*no meaning.*closed form"),
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode=True.*no meaning.*never change"),
        ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex.*generation_kwargs"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching.*no meaning"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32.*no meaning"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile.*no meaning"),
        ({"temperature": 0.7}, "temperature=0.7.*no meaning.*sigma"),
        ({"top_p": 0.9}, "top_p.*greedily"),
        ({"top_k": 5}, "top_k.*greedily"),
        ({"min_p": 0.1}, "min_p.*greedily"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1.*no meaning.*greedily.*generation_kwargs"),
        ({"cache_implementation": "static"}, "cache_implementation='static'.*no meaning.*dynamic"),
        ({"vllm_importance_sampling_mode": "token_mask"}, "vllm_importance_sampling_mode.*no token is trained on"),
    ],
)
def test_bad_input(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        LatentGRPOConfig(str(tmp_path / "run"), bf16=False, **kwargs)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "kwargs", "expected"),
    [
        (LatentGRPOConfig, {}, 64),
        (
            LatentGRPOConfig,
            {"num_generations": 12, "per_device_train_batch_size": 30, "gradient_accumulation_steps": 2},
            24,
        ),
        (LatentGRPOConfig, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, 16),
        (LatentGRPOConfig, {"num_generations_eval": 1}, 64),
        (LatentGRPOConfig, {"per_device_eval_batch_size": 32}, 32),
        (SoftTokenGRPOConfig, {}, 8),
        (SoftTokenGRPOConfig, {"num_generations": 16, "per_device_train_batch_size": 16}, 16),
        (LatentRLConfig, {}, 8),
    ],
)
def test_whole_groups_are_evaluated(tmp_path, config, kwargs, expected):
    for strategy in ("no", "steps"):
        args = config(str(tmp_path), bf16=False, eval_strategy=strategy, eval_steps=1, **kwargs)
        assert args.per_device_eval_batch_size == expected


def test_groups_that_evaluation_cannot_hold(tmp_path):
    for config in (LatentGRPOConfig, SoftTokenGRPOConfig):
        for size in ({"num_generations": 16}, {"num_generations_eval": 16}):
            sizes = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 24, **size}
            with pytest.raises(ValueError, match="24.*16"):
                config(str(tmp_path), bf16=False, eval_strategy="steps", eval_steps=1, **sizes)
            args = config(str(tmp_path), bf16=False, **sizes)  # of no account without evaluation
            with pytest.raises(
                ValueError, match=f"eval_batch_size=24.*whole groups of `{next(iter(size))}=16`.*multiple"
            ):
                args.check_evaluation()


def test_policy_fields_have_the_policys_own_defaults(tmp_path):
    policy_defaults = {f.name: f.default for f in dataclasses.fields(LatentPolicyConfig)}
    for name, value in LatentGRPOConfig(str(tmp_path), bf16=False).policy_kwargs().items():
        assert policy_defaults[name] == value, name


def test_command_line_reaches_every_field(tmp_path):
    (args,) = TrlParser(LatentGRPOConfig).parse_args_and_config(
        [
            "--output_dir",
            str(tmp_path),
            "--bf16",
            "false",
            "--latent_dim",
            "8",
            "--gamma",
            "0.1",
            "--contrastive_similarity",
            "dot",
        ]
        + ["--main_model_init_kwargs", '{"dtype": "float32"}', "--seed", "3"]
    )
    assert (args.latent_dim, args.gamma, args.contrastive_similarity, args.seed) == (8, 0.1, "dot", 3)
    assert args.main_model_init_kwargs == {"dtype": "float32"}
