# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Train a language model that thinks in its hidden states to please a value head (LatentRLTrainer). Experimental: it is
here to be studied, and does not improve a model.

Examples:

    trl-dlr latent-rl --config examples/configs/latent_rl.yaml --model_name_or_path outputs/coconut_gsm8k
"""

from trl import ModelConfig

from ..cli.launch import run_script
from ..experimental.latent_rl import LatentRLConfig, LatentRLTrainer
from . import soft_token_grpo
from .soft_token_grpo import ThinkingScriptArguments


ARGUMENTS = (ThinkingScriptArguments, LatentRLConfig, ModelConfig)


def main(script_args: ThinkingScriptArguments, training_args: LatentRLConfig, model_args: ModelConfig) -> None:
    soft_token_grpo.main(script_args, training_args, model_args, LatentRLTrainer)


if __name__ == "__main__":
    run_script("latent-rl", main, ARGUMENTS)
