# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""DeepSpeed ZeRO-2: what a run with it must be, and its checkpoints for another number of processes."""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from .latent_grpo_config import LatentGRPOConfig


def check_deepspeed(args: LatentGRPOConfig) -> None:
    """
    Check what a launch asks of DeepSpeed, before anything is built.

    Raises:
        `ValueError`: if it would not run, or not as ZeRO-2.
    """
    plugin = args.deepspeed_plugin
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise ValueError(
            "DeepSpeed is configured, but the environment has `ACCELERATE_USE_CPU`, with which accelerate leaves it "
            "out and runs plain data parallelism. Unset it: `use_cpu=True` in `args` is enough on a CPU."
        )
    if plugin.zero_stage != 2:
        raise ValueError(
            f"`zero_stage={plugin.zero_stage}` is not supported: a policy is small and whole on every process, and "
            "its gradients and optimizer states are partitioned. Set `zero_stage: 2` "
            "(accelerate_configs/deepspeed_zero2.yaml)."
        )
    if args.projection_learning_rate is not None and "optimizer" in plugin.deepspeed_config:
        raise ValueError(
            f"`projection_learning_rate={args.projection_learning_rate}` does not go with an optimizer in DeepSpeed's "
            "configuration, which has one rate. Leave either out: accelerate_configs/deepspeed_zero2.yaml has none."
        )


def check_engine(engine: nn.Module, policy: nn.Module, main_model: nn.Module) -> str:
    """
    Check that DeepSpeed ZeRO-2 runs, with the policy and nothing else in it.

    Returns:
        `str`: what is partitioned how, for the log.

    Raises:
        `RuntimeError`: if it is another engine, or if it holds the main model.
        `ValueError`: if its configuration would apply gradients that are not finite.
    """
    stage = engine.zero_optimization_stage() if isinstance(engine, DeepSpeedEngine) else None
    if stage != 2:
        raise RuntimeError(
            f"DeepSpeed ZeRO-2 is configured, but the policy runs in {type(engine).__name__} with stage {stage}."
        )
    zero = engine.optimizer
    inside = {id(parameter) for group in zero.bit16_groups for parameter in group}
    if not inside <= {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}:
        raise RuntimeError("The DeepSpeed engine holds weights that are not the policy's trainable ones.")
    if inside & {id(parameter) for parameter in main_model.parameters()}:
        raise RuntimeError("The DeepSpeed engine holds weights of the main model, which is frozen.")
    if not zero.compute_grad_norm or (zero.dtype == torch.bfloat16 and not zero.check_grad_overflow):
        raise ValueError(
            "DeepSpeed's configuration has `compute_grad_norm` or `bf16.check_grad_overflow` off, so it would apply "
            "gradients that are not finite. Leave both on, as they are by default."
        )
    sizes = [partition.numel() for partition in zero.single_partition_of_fp32_groups]
    total = sum(parameter.numel() for group in zero.bit16_groups for parameter in group)
    return (
        f"DeepSpeedEngine, ZeRO stage {stage}, {zero.dtype}: {total:,} trainable parameters, whose gradients and "
        f"optimizer states are partitioned; this process has {sum(sizes):,} (groups of {', '.join(map(str, sizes))})"
    )


def cast_like_engine(reference: nn.Module, zero: DeepSpeedZeroOptimizer) -> None:
    """Cast a reference policy's weights as DeepSpeed has cast the policy's: else unchanged weights would have a KL."""
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(zero.dtype)


def make_universal(checkpoint: str, folder: str) -> None:
    """
    Write a checkpoint's ZeRO-2 state to `folder` as DeepSpeed's universal one, and link the other files there.

    Args:
        checkpoint (`str`):
            Checkpoint with the files of all processes.
        folder (`str`):
            Where to write; it must not exist yet.
    """
    tag = Path(checkpoint, "latest").read_text().strip()
    os.makedirs(folder)
    for path in Path(checkpoint).iterdir():
        if path.name != tag:
            os.symlink(path.absolute(), os.path.join(folder, path.name))
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with contextlib.redirect_stdout(sys.stderr):  # its steps
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=os.path.join(checkpoint, tag),
                output_folder=os.path.join(folder, tag),  # the name by which transformers knows a checkpoint
                inject_missing_state=True,
                **options,
            )
        )
