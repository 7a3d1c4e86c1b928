# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Say what a run of `train_gsm8k.py` takes of each GPU's memory, without a GPU and without loading a model.

The same YAML file and arguments as for training, and how many GPUs of which size:

    python examples/plan_memory.py --config examples/configs/gsm8k.yaml --gpu_memory 24

A model is built from its `config.json` alone, from the Hub or from a folder. The paper's recipe, offline:

    python examples/plan_memory.py --config examples/configs/paper_llama2_7b.yaml \
        --main_model_name_or_path examples/configs/architectures/llama2_7b \
        --model_name_or_path examples/configs/architectures/llama_1.3b \
        --num_processes 8 --zero_stage 2 --gpu_memory 40 80

Any argument of the run can be changed to see what it does, `--decoding_batch_size 16` for one. docs/memory.md has the
formula, and the plan beside measurements.
"""

import sys

from train_gsm8k import DEMO_CONFIG, ScriptArguments, load_smollm2
from trl import ModelConfig

from trl_dlr.cli.parser import CommandParser
from trl_dlr.cli.plan import PlanArguments, PlannedConfig, plan_and_print, shapes_of


def main(
    plan_args: PlanArguments, script_args: ScriptArguments, training_args: PlannedConfig, model_args: ModelConfig
) -> None:
    model = script_args.policy or model_args.model_name_or_path
    # SmolLM2 is small enough to be real
    main_model = script_args.main_model_name_or_path or load_smollm2()[0]
    policy, main_model = shapes_of(model, main_model, script_args.assistant_num_layers, training_args, model_args)
    plan_and_print(plan_args, policy, main_model, training_args, model_args)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] == "--config" for argument in arguments):
        arguments = ["--config", str(DEMO_CONFIG), *arguments]
    parser = CommandParser((PlanArguments, ScriptArguments, PlannedConfig, ModelConfig))
    main(*parser.parse_args_and_config(arguments))
