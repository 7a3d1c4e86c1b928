# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Train a latent policy with DeepLatent Reasoning, and say what its latents do. This is `trl-dlr train` as a script,
which trl_dlr/scripts/latent_grpo.py has in full.

Offline demo: SmolLM2-135M-Instruct as the frozen main model, "What is a + b?", minutes on two CPU cores:

    accelerate launch examples/train_gsm8k.py

Offline demo of latents that carry the question, from a supervised start:

    trl-dlr sft --config examples/configs/sft_codes.yaml
    accelerate launch examples/train_gsm8k.py --config examples/configs/codes.yaml --policy outputs/sft_codes

GSM8K from the Hub, or from local JSONL files with `question` and `answer`:

    accelerate launch examples/train_gsm8k.py --config examples/configs/gsm8k.yaml
    accelerate launch examples/train_gsm8k.py --config examples/configs/gsm8k_smollm2.yaml \
        --dataset_name train.jsonl --eval_dataset_name test.jsonl

The paper's recipe (LLaMA-2-7B with a 1.3B assistant) on 8 GPUs:

    accelerate launch --config_file accelerate_configs/deepspeed_zero2.yaml examples/train_gsm8k.py \
        --config examples/configs/paper_llama2_7b.yaml

Every field of `LatentGRPOConfig` and TRL's `ModelConfig` can be given on the command line; `--help` lists those of
this package. `<output_dir>/eval_results.json` holds the table that is printed, `<output_dir>/report/report.html` shows
the run.
"""

import sys
from pathlib import Path

from trl_dlr.cli.launch import run_script
from trl_dlr.scripts.latent_grpo import ARGUMENTS, main


DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.yaml"

if __name__ == "__main__":
    if not any(argument.split("=")[0] in ("--config", "--help", "-h") for argument in sys.argv):
        print("Offline demo (examples/configs/demo.yaml); see --help and examples/configs for more.", flush=True)
        sys.argv[1:1] = ["--config", str(DEMO_CONFIG)]
    run_script("train", main, ARGUMENTS)
