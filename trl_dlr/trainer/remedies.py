# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Latent-GRPO's remedies (arXiv 2604.27998), and costs, between a rollout and its loss."""

from typing import Any

import torch

from .advantages import group_advantages, select_first_latent


class RemediesMixin:
    """For a [`~trl.GRPOTrainer`] of latents whose configuration has [`RemedyArguments`]."""

    def _remedy_advantages(
        self,
        output: dict[str, Any],
        rewards: torch.Tensor,
        is_valid: torch.Tensor,
        log_probs: torch.Tensor | None,
        mask: torch.Tensor,
        costs: torch.Tensor | None = None,
    ) -> None:
        """
        Replace advantages as the configuration asks for.

        Args:
            output (`dict[str, Any]`):
                Rollout, of which `advantages` is changed, to shape `(num_rows, num_positions)` with
                `first_latent_selection`; `completion_advantages` are then those of whole completions.
            rewards (`torch.Tensor` of shape `(num_processes * num_rows,)`):
                Total rewards of all processes' rows, NaN where there is none.
            is_valid (`torch.Tensor` of shape `(num_rows,)`):
                Rows that ended by themselves.
            log_probs (`torch.Tensor` of shape `(num_rows, num_positions)`, *optional*):
                Log-probabilities under the policy that sampled, needed for `first_latent_selection`.
            mask (`torch.Tensor` of shape `(num_rows, num_positions)`):
                0 at positions that are no actions.
            costs (`torch.Tensor` of shape `(num_rows,)`, *optional*):
                What is taken off each row's reward for its advantage.
        """
        num_generations = self.num_generations if self.model.training else self.num_generations_eval

        def groups(of_process: torch.Tensor) -> torch.Tensor:
            if of_process.dim() > 1:  # completions of one process may be longer than those of another
                of_process = self.accelerator.pad_across_processes(of_process, dim=1)
            return self.accelerator.gather(of_process).unflatten(0, (-1, num_generations))

        def of_process(groups: torch.Tensor) -> torch.Tensor:
            return groups.flatten(0, 1).tensor_split(self.accelerator.num_processes)[self.accelerator.process_index]

        if self.args.invalid_samples != "keep" or costs is not None:
            keeps_all = self.args.invalid_samples == "keep"
            is_valid = None if keeps_all else groups(is_valid.to(self.accelerator.device))
            rewards = rewards.unflatten(0, (-1, num_generations))
            if costs is not None:
                rewards = rewards - groups(costs)
            scale = self.args.scale_rewards == "group"
            invalid = "include" if keeps_all else self.args.invalid_samples
            advantages = group_advantages(rewards, is_valid, invalid, scale)
            output["advantages"] = of_process(advantages)
            logged = self._logs["advantages"]
            for _ in range(min(len(logged), advantages.numel())):
                logged.pop()
            logged.extend(advantages.flatten().tolist())
        if self.args.first_latent_selection:
            output["completion_advantages"] = output["advantages"]
            selected = select_first_latent(groups(output["advantages"]), groups(log_probs), groups(mask))
            output["advantages"] = of_process(selected)[:, : mask.size(1)]
