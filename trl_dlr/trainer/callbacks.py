# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from collections.abc import Callable

from accelerate.logging import get_logger
from transformers import TrainerCallback

from .latent_grpo_config import LatentGRPOConfig


logger = get_logger(__name__)

MIN_MIXED_GROUPS = 0.3


class ExplorationCheckCallback(TrainerCallback):
    """
    Says before the first step whether there is anything to learn from.

    Args:
        measure (`Callable[[int], float]`):
            Share of groups with differing rewards on a number of prompts.
    """

    def __init__(self, measure: Callable[[int], float]):
        self.measure = measure

    def on_train_begin(self, args: LatentGRPOConfig, state, control, **kwargs):
        if state.global_step > 0 or args.exploration_check_prompts == 0:
            return
        share = self.measure(args.exploration_check_prompts)
        logger.info(f"Groups with mixed rewards before training: {share:.2f}")
        if share < MIN_MIXED_GROUPS:
            logger.warning(
                f"Only {share:.0%} of the groups have differing rewards before training, on "
                f"{args.exploration_check_prompts} prompts; below {MIN_MIXED_GROUPS:.0%} there is little to learn from. "
                "If all answers are wrong, use easier questions, another `anchor_text`, or a policy with a supervised "
                "start; if all answers are alike, raise `injection_scale`, `sigma` or `num_generations`."
            )
