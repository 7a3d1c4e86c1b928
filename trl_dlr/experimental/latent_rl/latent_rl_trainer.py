# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A predicted accuracy that rises while accuracy does not."""

import math
import os
import textwrap
import warnings
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedModel, TrainerCallback

from ...models.architectures import base_model_of
from ...models.hidden_thoughts import add_hidden_thoughts
from ...models.hub import name_or_model
from ...models.value_head import VALUE_HEAD_FILE, StateValueHead
from ...trainer.checkpoints import load_moments, moments_of, whole_files, with_prefix
from ...trainer.inputs import config_or_default
from ...trainer.prescreening import area_under_curve, f1_score
from ...trainer.soft_token_grpo_trainer import SoftTokenGRPOTrainer
from .latent_rl_config import LatentRLConfig


class LatentRLTrainer(SoftTokenGRPOTrainer):
    r"""
    Trainer for latent RL, the second method of the paper [Reinforcement Learning for Latent-Space Thinking in
    LLMs](https://huggingface.co/papers/2512.11816), for a language model whose latents are its own last hidden states
    (Coconut).

    **Experimental.** This training is unstable: the language model learns to please the value head rather than to be
    right (reward hacking). The run stops when the accuracy that the head predicts rises and accuracy does not
    (`hacking_window`), but a higher score is never evidence of better answers: judge a model by held-out accuracy
    alone.

    In the first `value_warmup_steps` steps, a value head V learns from rollouts of the language model, which stays as
    it is: by binary cross-entropy with weight `pos_weight` on correct answers, V(h_t) at every latent h_t predicts
    whether the answer is correct. In all steps after them V stays as it is, and the language model maximizes the mean
    of σ(V(h_t)) over its latents, with gradient through each latent into those before it. What is decoded then is for
    the metrics alone.

    Logged for each rollout before anything learns from it, and over the whole evaluation set: `value/auc` and
    `value/f1` of the head (an answer is predicted to be correct where its mean score is above 0.5), the mean
    `value/score`, `value/predicted_accuracy`, which is the mean of σ(V(h_t) - log `pos_weight`) and without hacking
    near `value/accuracy`.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_dlr.experimental.latent_rl import LatentRLConfig, LatentRLTrainer
    >>> from trl_dlr.rewards import correctness_reward

    >>> dataset = load_dataset("openai/gsm8k", "main", split="train").rename_column("question", "prompt")

    >>> trainer = LatentRLTrainer(
    ...     model="Qwen/Qwen2.5-1.5B-Instruct",
    ...     reward_funcs=correctness_reward,
    ...     args=LatentRLConfig("latent-rl", num_latents=6),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal LM to train, best one that [`CoconutSFTTrainer`] has trained to think.
        reward_funcs (`RewardFunc | list[RewardFunc]`):
            Reward functions, as in [`~trl.GRPOTrainer`]. An answer is correct if its total reward is above 0.
        args ([`LatentRLConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        *others, **kwargs:
            As in [`SoftTokenGRPOTrainer`].

    Raises:
        `ValueError`: if an argument does not fit, with its name, the value seen and what would be right.
    """

    _tag_names = ["trl", "trl_dlr", "latent-reasoning", "latent-rl"]
    _name = "Latent RL"
    _paper = {
        "title": "Reinforcement Learning for Latent-Space Thinking in LLMs",
        "id": "2512.11816",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{ozeren2025reinforcement,
                title        = {{Reinforcement Learning for Latent-Space Thinking in LLMs}},
                author       = {Enes {\\"O}zeren and Matthias A{\\ss}enmacher},
                year         = 2025,
                eprint       = {arXiv:2512.11816},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: Any = None,
        args: LatentRLConfig | None = None,
        *others,
        **kwargs,
    ):
        warnings.warn(
            "`LatentRLTrainer` is experimental: its training is known to be unstable and to end in reward hacking, "
            "where the value head's score rises and accuracy does not. Judge the model by held-out accuracy alone.",
            stacklevel=2,
        )
        model = name_or_model(model, "model")
        args = config_or_default(args, LatentRLConfig, model, "LatentRL")
        super().__init__(model, reward_funcs, args, *others, **kwargs)

        causal_lm = base_model_of(self.model)
        add_hidden_thoughts(causal_lm)
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)  # the same head on every process
            self.value_head = StateValueHead(causal_lm.config.get_text_config().hidden_size)
        self.value_head.to(self.accelerator.device)
        self.value_optimizer = torch.optim.AdamW(self.value_head.parameters(), lr=args.value_learning_rate)
        self._hacking = RewardHackingCallback(args.hacking_window, args.hacking_threshold)
        if args.hacking_window > 0:
            self.add_callback(self._hacking)
        self._evaluated = []  # scores and rewards of all processes' rows, batch by batch

    @property
    def is_value_phase(self) -> bool:
        """Whether it is the value head that learns. If not, it is the language model."""
        return self.state.global_step < self.args.value_warmup_steps

    # ---- Rollout: what the head makes of it, before anything learns from it ----

    def _get_per_token_logps_and_entropies(self, *args, **kwargs) -> tuple[None, None, None]:
        """None: the loss is not of what was drawn."""
        return None, None, None

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        output["rewards"] = self._rewards.split(len(inputs))[self.accelerator.process_index]
        log_odds = self.value_head(output["latent_states"])
        # The weighted loss is least where the log-odds are too high by the log of the weight
        unweighted = log_odds - math.log(self.args.pos_weight)
        scores, predicted = gather(torch.stack([log_odds, unweighted], 1).sigmoid().mean(2)).unbind(1)
        if self.model.training:
            self._log_value("train", scores, predicted, self._rewards)
        else:
            self._evaluated.append((scores, predicted, self._rewards))
        return output

    def _log_value(self, mode: str, scores: torch.Tensor, predicted: torch.Tensor, rewards: torch.Tensor) -> None:
        is_scored = ~rewards.isnan()
        if not is_scored.any():
            return
        scores, is_correct = scores[is_scored], rewards[is_scored] > 0
        accuracies = predicted[is_scored].mean().item(), is_correct.float().mean().item()
        metrics = {"auc": area_under_curve(scores, is_correct), "f1": f1_score(scores > 0.5, is_correct)}
        metrics |= {"score": scores.mean().item(), "predicted_accuracy": accuracies[0], "accuracy": accuracies[1]}
        if mode == "train" and self.args.hacking_window > 0:
            self._hacking.add(*accuracies, has_moved=self.state.global_step > self.args.value_warmup_steps)
            if self._hacking.rises is not None:
                metrics["predicted_accuracy_rise"], metrics["accuracy_rise"] = self._hacking.rises
        for name, value in metrics.items():
            if value is not None:
                self._metrics[mode][f"value/{name}"].append(value)

    def evaluation_loop(self, *args, **kwargs):
        """Trainer's, and how well the head tells correct answers from wrong ones, over the whole set."""
        self._evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        self._log_value("eval", *map(torch.cat, zip(*self._evaluated, strict=True)))
        return output

    # ---- Loss: first the value head's, then the language model's ----

    def training_step(self, model, inputs, num_items_in_batch):
        if not self.is_value_phase:
            return super().training_step(model, inputs, num_items_in_batch)
        # Nothing passes backward into the language model: its optimizer finds no gradients, whatever the engine
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        if self.accelerator.sync_gradients:
            self.value_optimizer.step()
            self.value_optimizer.zero_grad()
        self._step += 1
        return loss.detach()

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        self.value_head.requires_grad_(self.is_value_phase)
        loss = self._value_loss(inputs) if self.is_value_phase else self._policy_loss(model, inputs)
        return loss / self.current_gradient_accumulation_steps if mode == "train" else loss

    def _value_loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Binary cross-entropy of V at each latent, over the rows of all processes that have a reward."""
        states, rewards = gather(inputs["latent_states"]), gather(inputs["rewards"])
        is_scored = ~rewards.isnan()
        logits = self.value_head(states[is_scored])
        is_correct = (rewards[is_scored] > 0).to(logits).unsqueeze(1).expand_as(logits)
        pos_weight = torch.tensor(self.args.pos_weight, device=logits.device)
        loss = binary_cross_entropy_with_logits(logits, is_correct, pos_weight=pos_weight, reduction="sum")
        return loss / max(logits.numel(), 1)

    def _policy_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Negative mean of σ(V(h)) over the latents, which are computed again, with gradient."""
        # Equal questions have equal latents: each is read once
        prompts = torch.stack([inputs["prompt_ids"], inputs["prompt_mask"]], dim=1)
        prompts, counts = prompts.unique(dim=0, return_counts=True)
        prompt_ids, prompt_mask = prompts.unbind(1)
        # The first latent is the last state of the question, so all but the last are read to have all
        read = prompt_ids.new_full((len(prompts), self.args.num_latents - 1), self.thinker.placeholder_id)
        with self.accelerator.autocast():
            output = model(
                input_ids=torch.cat([prompt_ids, read], dim=1),
                attention_mask=torch.cat([prompt_mask, torch.ones_like(read)], dim=1),
                is_latent=torch.cat([torch.zeros_like(prompt_ids), torch.ones_like(read)], dim=1).bool(),
                output_hidden_states=True,
                logits_to_keep=1,
            )
        states = output.hidden_states[-1][:, -self.args.num_latents :]
        scores = self.value_head(states).sigmoid().mean(1)
        # DDP waits for a gradient of the LM head too: it gets one of 0
        return 0.0 * output.logits.float().sum() - (scores * counts).sum() / counts.sum()

    # ---- Checkpoints ----

    def _checkpoint_record(self) -> dict[str, Any]:
        record = super()._checkpoint_record()
        record["run"]["value_warmup_steps"] = self.args.value_warmup_steps
        return record

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            with whole_files(output_dir or self.args.output_dir) as folder:
                save_file(self.value_head.state_dict(), os.path.join(folder, VALUE_HEAD_FILE))

    def _extra_state(self) -> dict[str, torch.Tensor]:
        head = {f"value_head.{name}": tensor for name, tensor in self.value_head.state_dict().items()}
        return super()._extra_state() | head | moments_of(self.value_optimizer) | self._hacking.state_tensors()

    def _load_extra_state(self, tensors: dict[str, torch.Tensor]) -> None:
        super()._load_extra_state(tensors)
        self.value_head.load_state_dict(with_prefix(tensors, "value_head."))
        load_moments(self.value_optimizer, tensors)
        self._hacking.load_state_tensors(tensors)

    def _load_best_model(self):
        super()._load_best_model()
        path = os.path.join(self.state.best_model_checkpoint, VALUE_HEAD_FILE)
        self.value_head.load_state_dict(load_file(path))


logger = get_logger(__name__)


class RewardHackingCallback(TrainerCallback):
    """
    Stops a run, with a checkpoint, whose policy raises the accuracy that a value head predicts but not its accuracy.

    The latest `window` rollouts are compared with the last `window` before the policy's first update (or as many as
    there were): the run stops if predicted accuracy is higher by more than `threshold` in the mean, and accuracy is
    not higher.

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
        """
        Rises of predicted accuracy and accuracy. `None` as long as there are fewer than `window` rollouts to tell
        from.
        """
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
                f"changed by {predicted:+.3f}, and accuracy by {accuracy:+.3f} (means over {self.window} rollouts). "
                f"The policy has learned to please the head, so training stops after step {state.global_step}, with a "
                "checkpoint. Earlier checkpoints are better ones; a smaller `learning_rate` or more "
                "`value_warmup_steps` may help. `hacking_window=0` switches this off."
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
