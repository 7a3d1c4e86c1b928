# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A predicted accuracy that rises while accuracy does not."""

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback


logger = get_logger(__name__)


class RewardHackingCallback(TrainerCallback):
    """
    Stops a run, with a checkpoint, whose policy raises the accuracy that a value head predicts but not its accuracy.

    The latest `window` rollouts are compared with the last `window` before the policy's first update (or as many as there
    were): the run stops if predicted accuracy is higher by more than `threshold` in the mean, and accuracy is not higher.

    Args:
        window (`int`):
            Rollouts that are averaged.
        threshold (`float`):
            Rise of predicted accuracy that has to come with a rise of accuracy.
    """

    def __init__(self, window: int, threshold: float):
        self.window, self.threshold = window, threshold
        self.before, self.since = [], []  # both accuracies of rollouts before the first update, and since

    def add(self, predicted_accuracy: float, accuracy: float, has_moved: bool) -> None:
        """Note a rollout, and whether the policy has been updated before it."""
        rollouts = self.since if has_moved else self.before
        rollouts.append((predicted_accuracy, accuracy))
        del rollouts[: -self.window]

    @property
    def rises(self) -> tuple[float, float] | None:
        """Rises of predicted accuracy and accuracy. `None` as long as there are fewer than `window` rollouts to tell from."""
        if len(self.since) < self.window or not self.before:
            return None
        means = [torch.tensor(rollouts, dtype=torch.float64).mean(0) for rollouts in (self.before, self.since)]
        return tuple((means[1] - means[0]).tolist())

    @property
    def is_hacking(self) -> bool:
        return self.rises is not None and self.rises[0] > self.threshold and self.rises[1] <= 0

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_hacking:
            predicted, accuracy = self.rises
            logger.warning(
                f"Reward hacking: since the first update of the policy, the accuracy that the value head predicts has "
                f"changed by {predicted:+.3f}, and accuracy by {accuracy:+.3f} (means over {self.window} rollouts). The "
                f"policy has learned to please the head, so training stops after step {state.global_step}, with a "
                "checkpoint. Earlier checkpoints are better ones; a smaller `learning_rate` or more `value_warmup_steps` "
                "may help. `hacking_window=0` switches this off."
            )
            control.should_save = control.should_training_stop = True

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Rollouts noted so far, for a checkpoint."""
        rollouts = {"before": self.before, "since": self.since}
        return {f"hacking.{name}": torch.tensor(rows, dtype=torch.float64) for name, rows in rollouts.items()}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load what [`state_tensors`] returned."""
        self.before, self.since = (
            [tuple(row) for row in tensors[f"hacking.{n}"].tolist()] for n in ("before", "since")
        )
