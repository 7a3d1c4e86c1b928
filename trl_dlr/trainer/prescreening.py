# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Which of a question's trajectories are worth decoding: a value head that learns from the decoded ones."""

import os

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ..models.value_head import VALUE_HEAD_FILE, ValueHead
from .checkpoints import load_moments, moments_of, with_prefix


REPLAY_SIZE = (
    2048  # decoded trajectories that the head goes on learning from: the main model is frozen, so they stay true
)
UPDATES_PER_ROLLOUT = 16
LEARNING_RATE = 1e-3  # of the head
RANDOM_SHARE = 0.25  # of what is decoded, in the selections that have such a part: it keeps the head honest
UPDATE_BATCH_SIZE = 256


class Prescreener:
    """
    Trains a [`ValueHead`] online with the binary cross-entropy of decoded rewards, and saves and loads it.

    Rewards are scaled to [0, 1] by the lowest and highest seen so far. Processes that are given the same rows stay
    alike: nothing here draws from a global generator.

    Args:
        head ([`ValueHead`]):
            Head to train.
    """

    def __init__(self, head: ValueHead):
        self.head = head
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE)
        device = next(head.parameters()).device
        self.reward_range = torch.tensor([torch.inf, -torch.inf], device=device)  # lowest and highest so far
        self.replay = {}

    @torch.no_grad()
    def score(self, latents: torch.Tensor, question_states: torch.Tensor) -> torch.Tensor:
        """Log-odds of reward, shape `(batch_size,)`."""
        return self.head(latents, question_states)

    def is_rewarded(self, rewards: torch.Tensor) -> torch.Tensor:
        """Whether rewards lie in the upper half of the range seen so far."""
        return rewards > self.reward_range.mean()

    @torch.enable_grad()
    def learn(
        self, latents: torch.Tensor, question_states: torch.Tensor, rewards: torch.Tensor, seed: int
    ) -> float | None:
        """
        Update the head on decoded trajectories and on those before them.

        Args:
            latents (`torch.Tensor` of shape `(num_decoded, num_latents, latent_dim)`):
                Decoded trajectories.
            question_states (`torch.Tensor` of shape `(num_decoded, hidden_size)`):
                States of their questions.
            rewards (`torch.Tensor` of shape `(num_decoded,)`):
                Total rewards.
            seed (`int`):
                Seed of the mini-batches.

        Returns:
            `float`: mean loss, or `None` as long as all rewards are alike and there is nothing to tell apart.
        """
        new = {"latents": latents.float(), "question_states": question_states.float(), "rewards": rewards.float()}
        if self.replay:
            new = {name: torch.cat([self.replay[name], rows]) for name, rows in new.items()}
        self.replay = {name: rows[-REPLAY_SIZE:] for name, rows in new.items()}
        if len(rewards) > 0:
            lowest, highest = rewards.aminmax()
            self.reward_range = torch.stack(
                [torch.minimum(self.reward_range[0], lowest), torch.maximum(self.reward_range[1], highest)]
            )
        lowest, highest = self.reward_range
        if not highest > lowest:
            return None
        targets = (self.replay["rewards"] - lowest) / (highest - lowest)
        generator = torch.Generator().manual_seed(seed)
        losses = []
        for _ in range(UPDATES_PER_ROLLOUT):
            rows = torch.randint(len(targets), (UPDATE_BATCH_SIZE,), generator=generator).to(targets.device)
            logits = self.head(self.replay["latents"][rows], self.replay["question_states"][rows])
            loss = F.binary_cross_entropy_with_logits(logits, targets[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()

    def to(self, device: torch.device) -> "Prescreener":
        """Move the head, before it has learned anything."""
        self.head.to(device)
        self.reward_range = self.reward_range.to(device)
        return self

    def save_head(self, folder: str) -> None:
        save_file(self.head.state_dict(), os.path.join(folder, VALUE_HEAD_FILE))

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Head and what training it on needs, for a checkpoint."""
        tensors = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        tensors |= {f"replay.{name}": rows for name, rows in self.replay.items()}
        return {"reward_range": self.reward_range, **tensors, **moments_of(self.optimizer)}

    def load_head(self, folder: str) -> None:
        self.head.load_state_dict(load_file(os.path.join(folder, VALUE_HEAD_FILE)))

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load what [`state_tensors`] returned."""
        self.reward_range = tensors["reward_range"]
        self.head.load_state_dict(with_prefix(tensors, "head."))
        self.replay = with_prefix(tensors, "replay.")
        load_moments(self.optimizer, tensors)


def select_trajectories(
    scores: torch.Tensor, num_decoded: int, selection: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Choose the trajectories of each question that are decoded (equation 13).

    The random ones are drawn uniformly from all of a question's, before the best of the others are added: their mean
    reward is an unbiased estimate of the policy's.

    Args:
        scores (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Score of each trajectory.
        num_decoded (`int`):
            Number K to choose of each group.
        selection (`str`):
            `"top"` (best scores), `"top_random"` (and a random share), `"top_bottom"` (best and worst scores in equal
            parts, and a random share) or `"random"`.
        seed (`int`):
            Seed of the draw, the same on every process.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: what is decoded, and what of it was drawn at random; `bool`, shaped like
        `scores`.
    """
    num_random = {"top": 0, "random": num_decoded}.get(selection, max(1, round(RANDOM_SHARE * num_decoded)))
    draws = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)).to(scores.device)
    is_random = torch.zeros_like(scores, dtype=torch.bool)
    is_random.scatter_(1, draws.topk(num_random, dim=1).indices, True)
    num_worst = (num_decoded - num_random) // 2 if selection == "top_bottom" else 0
    ranked = scores.masked_fill(is_random, -torch.inf).sort(dim=1, descending=True).indices  # random ones are last
    others = ranked[:, : scores.size(1) - num_random]
    num_best = num_decoded - num_random - num_worst
    is_decoded = is_random.scatter(1, others[:, :num_best], True)
    return is_decoded.scatter(1, others[:, others.size(1) - num_worst :], True), is_random


def area_under_curve(scores: torch.Tensor, labels: torch.Tensor) -> float | None:
    """
    Area under the ROC curve: how often a positive scores above a negative, a tie counting half. `None` without both.
    """
    positive, negative = scores[labels], scores[~labels]
    if len(positive) == 0 or len(negative) == 0:
        return None
    difference = positive.unsqueeze(1) - negative.unsqueeze(0)
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()


def f1_score(is_predicted: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Harmonic mean of precision and recall. `None` where neither predictions nor labels have a positive."""
    num_positive = is_predicted.sum() + labels.sum()
    return None if num_positive == 0 else (2 * (is_predicted & labels).sum() / num_positive).item()
