# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""DeepSpeed ZeRO-2: what a run with it must be, and the projection's own clipping of partitioned gradients."""

from collections.abc import Collection

import torch
from accelerate.utils import parse_flag_from_env
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.utils import combine_grad_norm_groups
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
    if args.projection_max_grad_norm is not None and plugin.offload_optimizer_device not in (None, "none"):
        raise ValueError(
            f"`projection_max_grad_norm={args.projection_max_grad_norm}` does not go with an offloaded optimizer "
            f"(`offload_optimizer_device={plugin.offload_optimizer_device!r}`), which clips while it offloads. Leave "
            "it unset, or do not offload."
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


def clip_separately(
    zero: DeepSpeedZeroOptimizer, projection: Collection[int], projection_max_norm: float, max_norm: float
) -> None:
    """
    Make a ZeRO-2 optimizer clip the projection layers' gradients and all others each to a norm of their own.

    ZeRO asks for the norm of all gradients once before a step, when each process holds its share of their averages:
    the moment to scale them. What it does with the norm after that is switched off.

    Args:
        zero (`DeepSpeedZeroOptimizer`):
            Optimizer whose parameter groups hold either projection layers or others.
        projection (`Collection[int]`):
            `id` of each parameter of the projection layers.
        projection_max_norm (`float`):
            Largest norm of their gradient.
        max_norm (`float`):
            Largest norm of all others' gradient; 0 leaves it as it is.
    """
    zero.clip_grad = 0.0
    parts = {True: [], False: []}
    for i, group in enumerate(zero.bit16_groups):
        parts[id(group[0]) in projection].append(i)

    def clip_and_return_norm() -> torch.Tensor:
        norms = []
        for is_projection, limit in ((True, projection_max_norm), (False, max_norm)):
            groups = parts[is_projection]
            shares = [(zero.averaged_gradients[i], zero.params_in_partition[i]) for i in groups]
            norm = combine_grad_norm_groups([zero.get_grad_norm_direct(*share) for share in shares])
            norms.append(norm)
            if limit > 0:
                factor = (limit * zero.loss_scale / (norm + 1e-6)).clamp(max=1.0)
                for gradients, _ in shares:
                    for gradient in gradients:
                        gradient.mul_(factor)
        return combine_grad_norm_groups(norms)

    zero.scaled_global_norm = clip_and_return_norm
