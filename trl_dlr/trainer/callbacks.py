# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from ..evaluation.preflight import MIN_MIXED_GROUPS
from .latent_grpo_config import LatentGRPOConfig


logger = get_logger(__name__)


class EngineCheckCallback(TrainerCallback):
    """
    Makes sure before the first step, and when resuming, that what was configured is what runs.

    Args:
        check (`Callable[[], None]`):
            Raises if not.
    """

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def on_train_begin(self, args: LatentGRPOConfig, state, control, **kwargs):
        self.check()


class EpochOrderCallback(TrainerCallback):
    """
    Makes the order of an epoch's rows depend on the epoch alone, so that a run resumed in a later one goes on with the
    same rows: the sampler draws each order from where its generator was left by the one before.
    """

    def __init__(self):
        self.sampler: RepeatSampler | None = None

    def on_epoch_begin(self, args: LatentGRPOConfig, state, control, **kwargs):
        if self.sampler is not None and self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(int(state.epoch)):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)


def fraction_mixed(groups: torch.Tensor) -> float:
    """
    Share of groups, shape `(num_groups, G)`, whose rewards differ: the only ones that teach anything. NaN is none.
    """
    highest, lowest = groups.nan_to_num(-torch.inf).amax(dim=1), groups.nan_to_num(torch.inf).amin(dim=1)
    return (highest > lowest).float().mean().item()


class ExplorationCheckCallback(TrainerCallback):
    """
    Says before the first step whether there is anything to learn from.

    Args:
        measure (`Callable[[int], torch.Tensor]`):
            Rewards of groups on a number of prompts, shape `(num_groups, G)`, NaN where there is none.
    """

    def __init__(self, measure: Callable[[int], torch.Tensor]):
        self.measure = measure

    def on_train_begin(self, args: LatentGRPOConfig, state, control, **kwargs):
        if state.global_step > 0 or args.exploration_check_prompts == 0:
            return
        groups = self.measure(args.exploration_check_prompts)
        share = fraction_mixed(groups)
        logger.info(f"Groups with mixed rewards before training: {share:.2f}")
        scored = groups[~groups.isnan()]
        if share == 1.0 and 2 * len(scored.unique()) > len(scored):
            within = torch.stack([group[~group.isnan()].std() for group in groups]).mean()
            logger.info(
                "Hardly two rewards are alike, so with this reward every group counts as mixed, whatever there is to "
                f"learn. Read its spread instead: a standard deviation of {within:.3g} among the answers to a "
                f"question, and of {scored.std():.3g} among all. What differs between questions alone teaches nothing."
            )
        if share < MIN_MIXED_GROUPS:
            logger.warning(
                f"Only {share:.0%} of the groups have differing rewards before training, on "
                f"{args.exploration_check_prompts} prompts; below {MIN_MIXED_GROUPS:.0%} there is little to learn "
                "from. If all answers are wrong, use easier questions, another `anchor_text`, or a policy with a "
                "supervised start; if all answers are alike, raise `injection_scale`, `sigma` or `num_generations`."
            )


class PreemptionCallback(TrainerCallback):
    """
    Turns SIGTERM, by which schedulers take a machine back, into a checkpoint after the step and an end of training.

    Args:
        is_true_anywhere (`Callable[[bool], bool]`):
            Whether any process says so: the signal may reach one, or all at different steps.
    """

    def __init__(self, is_true_anywhere: Callable[[bool], bool]):
        self.is_true_anywhere = is_true_anywhere
        self.is_signalled = self.is_preempted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # where no handler can be set
            yield
            return
        self.is_signalled = self.is_preempted = False
        # More of them change nothing: a launcher may pass on what the process has been sent already
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "is_signalled", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: LatentGRPOConfig, state, control, **kwargs):
        if self.is_true_anywhere(self.is_signalled):
            self.is_preempted = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the time until SIGKILL is for the checkpoint
