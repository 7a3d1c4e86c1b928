# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import copy
import itertools
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import align_module_device, gather
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import pad, use_adapter

from ..generation.text import as_completions, check_prompts
from ..models import LatentPolicyOutput
from ..models.architectures import base_model_of
from ..models.densities import Density, concatenate, put_rows
from ..models.hub import name_or_model
from ..models.main_model import disable_dropout, teacher_forced_inputs
from ..models.value_head import ValueHead
from .callbacks import EpochOrderCallback, ExplorationCheckCallback, fraction_mixed
from .checkpoints import CheckpointsMixin, rollout_from_tensors, rollout_tensors, share_weights, with_prefix
from .inputs import as_reward_funcs, check_datasets, check_gold_answers, config_or_default, refuse_arguments
from .latent_grpo_config import LatentGRPOConfig
from .losses import Scoring, add_likelihoods, clamp_log_ratio, contrastive_loss, shape_advantages
from .policy_training import (
    PolicyTrainingMixin,
    adapter_for_policy,
    assemble,
    build_engine,
    build_reference,
    check_optimizer,
    check_prompts_fit,
    check_use_of_policy,
    freeze_what_no_loss_reaches,
)
from .prescreening import Prescreener, area_under_curve, select_trajectories


logger = get_logger(__name__)

MAX_SKIPPED_STEPS = 5  # in a row, after which a run stops, if they are two rollouts at least
# Losses that TRL averages over all rows of a micro-batch, those without a reward included. The others are averaged
# over unmasked steps.
MEANS_OVER_ALL_ROWS = ("grpo", "dr_grpo", "luspo", "sapo")


@dataclass
class Rollout:
    """
    What TRL's hooks have found of the questions of one generation batch, in the order of their calls. B rows are this
    process's, N those of all processes.

    Args:
        assistant_prompt_ids (`list[list[int]]`):
            Prompts as the policy reads them, from `_generate`.
        main_prompt_ids (`list[list[int]]`, *optional*):
            Prompts as the main model reads them, from here on of `_generate_single_turn`.
        drawn ([`LatentPolicyOutput`], *optional*):
            Latents `(B, T, d)`, their lengths `(B,)` and density.
        is_decoded (`torch.Tensor` of shape `(B,)`, *optional*):
            Rows that the main model decodes.
        is_random (`torch.Tensor` of shape `(N,)`, *optional*):
            Rows that pre-screening did not choose by score.
        scores (`torch.Tensor` of shape `(N,)`, *optional*):
            The value head's, if there is one.
        completion_lengths (`list[int]`, *optional*):
            Tokens of each of the B rows.
        is_truncated (`torch.Tensor` of shape `(B,)`, *optional*):
            Rows whose completion ran into the token budget.
        judged (`list[int]`, *optional*):
            Rows that reward functions are called for, from `_calculate_rewards`.
        rewards (`torch.Tensor` of shape `(N,)`, *optional*):
            Total rewards, NaN where there is none.
    """

    assistant_prompt_ids: list[list[int]]
    main_prompt_ids: list[list[int]] | None = None
    drawn: LatentPolicyOutput | None = None
    is_decoded: torch.Tensor | None = None
    is_random: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    completion_lengths: list[int] | None = None
    is_truncated: torch.Tensor | None = None
    judged: list[int] | None = None
    rewards: torch.Tensor | None = None


class LatentGRPOTrainer(PolicyTrainingMixin, CheckpointsMixin, GRPOTrainer):
    r"""
    Trainer for DeepLatent Reasoning, proposed in the paper [Latent-Space Contrastive Reinforcement Learning for Stable
    and Efficient LLM Reasoning](https://huggingface.co/papers/2601.17275).

    A small latent policy (assistant LM, latent head and projector) samples G trajectories of T continuous latents per
    question. Each is injected as embeddings after the prompt of a frozen main model, which decodes the answer
    greedily. The rewards of the answers train the policy with a clipped GRPO loss on the exact density of the latents,
    a closed-form KL to a frozen reference, and a contrastive loss over each question's trajectories (equations 1 to
    8). The main model never changes. Not to be confused with the method of the paper "Latent-GRPO"
    ([2604.27998](https://huggingface.co/papers/2604.27998)).

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_dlr import LatentGRPOTrainer
    >>> from trl_dlr.rewards import correctness_reward

    >>> dataset = load_dataset("openai/gsm8k", "main", split="train").rename_column("question", "prompt")

    >>> trainer = LatentGRPOTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     main_model="Qwen/Qwen2.5-7B-Instruct",
    ...     reward_funcs=correctness_reward,
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to train. Can be either:

            - A string, being the Hub id or path of a saved [`LatentPolicyModel`], or of a causal LM that becomes the
              assistant of a new policy (fields of `args`), loaded with `args.model_init_kwargs`.
            - A [`LatentPolicyModel`], plain or wrapped by PEFT.
            - A causal LM, whose backbone is copied as the assistant of a new policy. [`first_layers`] and
              [`fresh_layers`] make small ones from the main model.
        reward_funcs (`RewardFunc | list[RewardFunc]`):
            Reward functions, as in [`~trl.GRPOTrainer`]. They see the text that the main model decoded.
        args ([`LatentGRPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with a column `"prompt"`, standard or conversational, as in [`~trl.GRPOTrainer`].
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], [`~datasets.DatasetDict`], [`~datasets.IterableDatasetDict`] or `dict[str, Dataset | IterableDataset]`, *optional*):
            Dataset to use for evaluation. It must meet the same requirements as `train_dataset`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the assistant. If `None`, the one saved with `model`, or the main model's if the assistant was
            made from it.
        reward_processing_classes ([`~transformers.PreTrainedTokenizerBase`] or `list[PreTrainedTokenizerBase]`, *optional*):
            Processing classes of reward models, as in [`~trl.GRPOTrainer`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler. By default AdamW with one learning rate for the assistant and one for the
            projection layers.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of the frozen main model when it is loaded by name.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration for the assistant. The projection layers stay trainable and are saved with the adapter.
        tools, rollout_func, environment_factory:
            Part of [`~trl.GRPOTrainer`]'s signature; refused, since latents are drawn before any text.
        main_model (`str` or [`~transformers.PreTrainedModel`]):
            Causal LM that decodes the answers. It is frozen, and is no part of the optimizer or of checkpoints.
        main_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the main model. If `None`, the one saved with it.

    Raises:
        `ValueError`: if an argument does not fit, with its name, the value seen and what would be right.
    """

    _tag_names = ["trl", "trl_dlr", "latent-reasoning", "deeplatent-reasoning"]
    _name = "DeepLatent Reasoning"
    _paper = {
        "title": "Latent-Space Contrastive Reinforcement Learning for Stable and Efficient LLM Reasoning",
        "id": "2601.17275",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{shan2026latent,
                title        = {{Latent-Space Contrastive Reinforcement Learning for Stable and Efficient LLM Reasoning}},
                author       = {Lianlei Shan and Han Chen and Yixuan Wang and Zhenjie Liu and Wei Li},
                year         = 2026,
                eprint       = {arXiv:2601.17275},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: Any = None,
        args: LatentGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: None = None,
        rollout_func: None = None,
        environment_factory: None = None,
        *,
        main_model: str | PreTrainedModel,
        main_processing_class: PreTrainedTokenizerBase | None = None,
    ):
        refused = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        refuse_arguments(type(self).__name__, "latents are drawn before any text", **refused)
        model = name_or_model(model, "model")
        args = config_or_default(args, LatentGRPOConfig, model, "LatentGRPO")
        check_datasets(train_dataset, eval_dataset, args)
        check_gold_answers(reward_funcs, train_dataset, eval_dataset)

        model, main_model, main_processing_class, processing_class = assemble(
            model, main_model, main_processing_class, processing_class, args, quantization_config
        )
        policy = base_model_of(model)
        check_use_of_policy(policy, args)
        check_optimizer(optimizers[0], main_model, args)
        engine = build_engine(main_model, main_processing_class, args)
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        check_prompts_fit(policy, engine, processing_class, datasets, args.chat_template_kwargs)
        freeze_what_no_loss_reaches(policy, args)
        prescreener = None
        if args.prescreening_fraction < 1:
            latent_size = policy.config.num_latents * policy.config.feature_size
            head = ValueHead(latent_size, policy.config.hidden_size)
            prescreener = Prescreener(head)
        if peft_config is not None and not isinstance(model, PeftModel):
            peft_config = adapter_for_policy(policy, peft_config)

        self.main_processing_class = main_processing_class
        self.num_latents = policy.config.num_latents
        self.kl_coef = args.beta
        if peft_config is not None:
            self._name_base_policy(policy, args.output_dir)
        ref_model = build_reference(model, args, peft_config)  # copied before TRL patches the model's forward

        # TRL would look for its reference model on the Hub and estimate the KL from samples; ours has a closed form.
        # Its vLLM would serve the trained model; ours serves the frozen one.
        use_vllm = args.use_vllm
        args.beta, args.use_vllm = 0.0, False
        try:
            super().__init__(
                model=model,
                reward_funcs=as_reward_funcs(reward_funcs),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )
        finally:
            args.beta, args.use_vllm = self.kl_coef, use_vllm

        self.main_model = main_model.requires_grad_(False).eval()
        if not (getattr(main_model, "is_quantized", False) or hasattr(main_model, "hf_device_map")):
            # All of it if it decodes; vLLM has weights of its own, and is given embeddings
            (self.main_model.get_input_embeddings() if use_vllm else self.main_model).to(self.accelerator.device)
        if args.hybrid_coef > 0:
            add_likelihoods(self.main_model)
        self.engine = engine
        self.prescreener = None if prescreener is None else prescreener.to(self.accelerator.device)
        self.eos_token_ids = engine.eos_token_ids
        self.max_completion_length = self.num_latents  # Dr. GRPO divides by the longest sequence of actions
        if args.disable_dropout:
            disable_dropout(self.model)
        if ref_model is not None:
            self.ref_model = share_weights(ref_model.to(self.accelerator.device))
        self._epoch_order = EpochOrderCallback()
        self.add_callback(self._epoch_order)
        self.add_callback(ExplorationCheckCallback(self._explore))

        self._rollout: Rollout | None = None
        self._decodes_all = False  # while exploration is measured
        self._groups = {}  # by mode: latents and means of whole groups, (num_groups, G, T, d)
        self._scoring: Scoring | None = None  # of the latest loss, `None` while there is a rollout
        self._rollout_time = 0.0
        self._optimize_time = 0.0
        self._skip_step = False
        self._skipped_in_a_row = 0

    # The order in which TRL calls its hooks, and what each hands on. B rows are this process's, N all processes'.
    #
    # A rollout, kept in `self._rollout`:
    #   _generate_and_score_completions            around all of it: the actions become latent steps, mask (B, T)
    #     _generate                                prompts, as the policy reads them
    #       _generate_single_turn                  latents (B, T, d) from the policy, then text from the main model
    #         _prescreen                           which rows are decoded, (B,)
    #     _calculate_rewards                       rewards (N,), NaN for what was not decoded
    #     (TRL's own code)                         group-relative advantages (B,)
    #     shape_advantages                         the same, or others where invalid samples or costs ask for them
    # Each of its losses, whose scores are in `self._scoring`:
    #   _compute_loss                              TRL's clipped surrogate, whose code has the ratio, then the terms of
    #                                              KL, contrast and likelihood
    #     _get_per_token_logps_and_entropies       log-density of each latent step, (B, T): the ratio is exp(new - old)
    #   training_step, _finish_step                the update, or none if a loss was bad

    # ---- Rollout: latents from the policy, text from the main model ----

    @contextmanager
    def _main_model_speaks(self) -> Iterator[None]:
        """While TRL renders prompts for decoding and decodes completions, its tokenizer is the main model's."""
        policy_tokenizers = self.processing_class, self._tokenizer
        self.processing_class = self._tokenizer = self.main_processing_class
        try:
            yield
        finally:
            self.processing_class, self._tokenizer = policy_tokenizers

    def _generate(self, prompts: list):
        check_prompts(prompts, "The dataset, in this rollout,")  # only the first rows of a stream were looked at
        assistant_prompt_ids, *_ = self._tokenize_prompts(prompts)
        rollout = self._rollout = Rollout(assistant_prompt_ids)
        with self._main_model_speaks():
            _, completion_ids, tool_mask, _, *others = super()._generate(prompts)
        if self.prescreener is not None or self.engine.stop_strings is not None:
            self._log_completion_lengths()
        completions = as_completions(self.engine.decode(completion_ids), prompts)  # as an evaluation has them
        # The policy is scored on its own reading of the prompt
        return rollout.assistant_prompt_ids, completion_ids, tool_mask, completions, *others

    def _log_completion_lengths(self) -> None:
        """TRL's metrics of completions, over the decoded ones."""
        mode, rollout = "train" if self.model.training else "eval", self._rollout
        lengths = torch.tensor(rollout.completion_lengths, device=self.accelerator.device)
        rows = torch.stack([lengths, rollout.is_truncated.to(lengths), rollout.is_decoded.to(lengths)], dim=1)
        lengths, is_truncated, is_decoded = self.accelerator.gather(rows).unbind(1)
        lengths, is_truncated = lengths[is_decoded.bool()].float(), is_truncated[is_decoded.bool()]
        ended = lengths[~is_truncated.bool()] if not is_truncated.all() else lengths.new_zeros(1)
        metrics = {"clipped_ratio": is_truncated.float().mean()}
        for name, values in (("", lengths), ("_terminated", ended)):
            metrics |= {f"mean{name}_length": values.mean(), f"min{name}_length": values.min()}
            metrics[f"max{name}_length"] = values.max()
        for name, value in metrics.items():
            self._metrics[mode][f"completions/{name}"][-1] = value.item()

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        mode, rollout = "train" if self.model.training else "eval", self._rollout
        # A question's rows stand next to each other: both models read it once
        readings = zip(map(tuple, prompt_ids), map(tuple, rollout.assistant_prompt_ids), strict=True)
        runs = [(reading, len(list(rows))) for reading, rows in itertools.groupby(readings)]
        num_samples = torch.tensor([count for _, count in runs])

        start = time.perf_counter()
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as policy,
            torch.no_grad(),
            self.accelerator.autocast(),
        ):
            prompts = [torch.tensor(ids) for (_, ids), _ in runs]
            input_ids = pad(prompts, padding_value=policy.config.pad_token_id, padding_side="left")
            attention_mask = pad([torch.ones_like(ids) for ids in prompts], padding_value=0, padding_side="left")
            device = self.accelerator.device
            drawn = rollout.drawn = policy.sample(input_ids.to(device), attention_mask.to(device), num_samples)
            is_decoded = rollout.is_decoded = self._prescreen(rollout, mode)
            latent_embeds = policy.inject(drawn.latents[is_decoded])
        num_decoded = torch.stack([part.sum() for part in is_decoded.split(num_samples.tolist())])
        sampled = time.perf_counter()
        tokens_before = self.engine.num_forward_tokens
        main_ids, lengths = [list(main) for (main, _), _ in runs], drawn.lengths[is_decoded]
        anchor_ids = policy.config.anchor_ids
        decoded_ids = iter(self.engine.generate(main_ids, latent_embeds, num_decoded, lengths, anchor_ids))
        decoded = time.perf_counter()

        # TRL wants a completion in every row: an empty one where nothing was decoded
        completion_ids = [next(decoded_ids) if chosen else self.eos_token_ids[:1] for chosen in is_decoded.tolist()]
        rollout.main_prompt_ids = prompt_ids
        rollout.completion_lengths = [len(ids) for ids in completion_ids]
        rollout.is_truncated = torch.tensor([not self.engine.is_finished(ids) for ids in completion_ids])
        tokens, rows = float(self.engine.num_forward_tokens - tokens_before), float(len(is_decoded))
        sums = torch.tensor([tokens, is_decoded.sum().item(), rows], device=device)
        tokens, num_decoded, rows = self.accelerator.reduce(sums, "sum").tolist()
        self._metrics[mode]["main_model/forward_tokens"].append(tokens)
        self._metrics[mode]["main_model/decoded_fraction"].append(num_decoded / rows)
        self._metrics[mode]["time/sample"].append(sampled - start)
        self._metrics[mode]["time/decode"].append(decoded - sampled)
        return completion_ids, None

    def _prescreen(self, rollout: Rollout, mode: str) -> torch.Tensor:
        """
        Which of this process's rows are decoded, shape `(num_rows,)`. Groups may span processes: all decide alike.
        """
        drawn = rollout.drawn
        num_rows, device = drawn.latents.size(0), drawn.latents.device
        rollout.is_random = torch.ones(num_rows * self.accelerator.num_processes, dtype=torch.bool, device=device)
        if self.prescreener is None or mode == "eval" or self._decodes_all:
            return rollout.is_random[:num_rows]
        features = self.policy.features(drawn.latents, drawn.lengths)
        rollout.scores = gather(self.prescreener.score(features, drawn.question_states))
        if self._num_rollouts < self.args.prescreening_warmup_rollouts:
            return rollout.is_random[:num_rows]
        is_decoded, is_random = select_trajectories(
            rollout.scores.view(-1, self.num_generations),
            self.args.num_decoded,
            self.args.prescreening_selection,
            seed=self._rollout_seed,
        )
        rollout.is_random = is_random.flatten()
        return is_decoded.flatten().split(num_rows)[self.accelerator.process_index]

    @property
    def _num_rollouts(self) -> int:
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    @property
    def _rollout_seed(self) -> int:
        """Seed that all processes share, another one for every rollout."""
        return self.args.seed * 1_000_003 + self._num_rollouts

    def _log_completion_extra(self, column: str, values: list):
        # A reward function saw the decoded rows, and the table has all
        value_of = dict(zip(self._rollout.judged, values, strict=False))
        super()._log_completion_extra(column, [value_of.get(row) for row in range(len(self._rollout.is_decoded))])

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Rewards of decoded rows, NaN for the others: reward functions do not see those."""
        mode, rollout = "train" if self.model.training else "eval", self._rollout
        start = time.perf_counter()
        device = self.accelerator.device
        is_decoded = gather(rollout.is_decoded)
        counts = is_decoded.view(self.accelerator.num_processes, -1).sum(1)
        most = int(counts.max())
        # Processes gather as many rows each: one with fewer repeats its own
        judged = rollout.is_decoded.nonzero().squeeze(1).tolist()
        judged = rollout.judged = (judged * most)[:most]
        if judged:
            of_decoded = super()._calculate_rewards(
                *([column[row] for row in judged] for column in (inputs, prompts, completions, completion_ids_list))
            )
        else:
            of_decoded = gather(torch.full((most, len(self.reward_funcs)), torch.nan, device=device))
        rewards_per_func = torch.full((len(is_decoded), len(self.reward_funcs)), torch.nan, device=device)
        rewards_per_func[is_decoded] = torch.cat(
            [rows[:count] for rows, count in zip(of_decoded.split(most), counts.tolist(), strict=True)]
        )
        self._metrics[mode]["time/reward"].append(time.perf_counter() - start)
        rewards = (rewards_per_func * self.reward_weights.to(device)).nansum(dim=1)
        rollout.rewards = rewards.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        self._metrics[mode]["frac_reward_mixed"].append(fraction_mixed(rollout.rewards.view(-1, num_generations)))
        return rewards_per_func

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        start = time.perf_counter()
        self._scoring = None
        output = super()._generate_and_score_completions(inputs)
        rollout, drawn, device = self._rollout, self._rollout.drawn, self.accelerator.device
        num_rows = len(inputs)

        if self.args.hybrid_coef > 0:
            prompt_ids = [torch.tensor(ids, device=device) for ids in rollout.main_prompt_ids]
            output["main_prompt_ids"] = pad(prompt_ids, padding_side="left")
            output["main_prompt_mask"] = pad([torch.ones_like(ids) for ids in prompt_ids], padding_side="left")
            lengths = torch.tensor(rollout.completion_lengths, device=device).unsqueeze(1)
            is_padding = torch.arange(output["completion_ids"].size(1), device=device) >= lengths
            output["decoded_ids"] = output["completion_ids"].masked_fill(is_padding, -100)

        # From here on the actions are the latent steps; the decoded tokens have done their work
        output["latents"], output["lengths"] = drawn.latents, drawn.lengths
        output["completion_ids"] = torch.zeros(num_rows, self.num_latents, dtype=torch.long, device=device)
        is_taken = torch.arange(self.num_latents, device=device) < drawn.lengths.unsqueeze(1)
        is_rewarded = ~rollout.rewards.isnan()  # of all processes' rows
        mask = is_taken.long() * is_rewarded.split(num_rows)[self.accelerator.process_index].unsqueeze(1)
        if self.mask_truncated_completions:
            mask = mask * (~rollout.is_truncated.to(device)).unsqueeze(1)
        output["completion_mask"] = mask
        output["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        output["rollout_step"] = torch.tensor(self.state.global_step, device=device)
        output["num_rewarded"] = is_rewarded.sum()

        if self.kl_coef != 0.0:
            reference = self._reference_density(output, mode)
            output.update({f"ref_{name}": parameter for name, parameter in reference.stored().items()})

        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        shape_advantages(
            output,
            self.args,
            self.accelerator,
            num_generations,
            rewards=rollout.rewards,
            is_valid=~rollout.is_truncated,
            log_probs=drawn.density.log_prob(drawn.latents),
            mask=mask,
            logged=self._logs["advantages"],
            costs=self.args.latent_cost * drawn.lengths if self.args.latent_cost > 0 else None,
        )
        latents = gather(self.policy.features(drawn.latents, drawn.lengths))  # groups may span processes
        if rollout.scores is not None:
            self._learn_to_prescreen(latents, gather(drawn.question_states))
        if self.args.gamma != 0.0:
            means = gather(self.policy.features(drawn.mean, drawn.lengths))
            self._groups[mode] = tuple(of.unflatten(0, (-1, num_generations)) for of in (latents, means))
            indices = torch.arange(num_rows, device=device) + self.accelerator.process_index * num_rows
            output["group_index"], output["member_index"] = indices // num_generations, indices % num_generations
        if self.args.gamma != 0.0 or self.args.hybrid_coef > 0:
            output["noise"] = drawn.density.noise_of(drawn.latents)
        self._log_drawn(drawn, latents.unflatten(0, (-1, num_generations)), mode)
        self._rollout_time += time.perf_counter() - start
        return output

    def _log_drawn(self, drawn: LatentPolicyOutput, groups: torch.Tensor, mode: str) -> None:
        """Metrics of a rollout's latents; `groups` are those of all processes, `(num_groups, G, T, d)`."""
        num_generations = groups.size(1)
        if num_generations > 1:
            directions = torch.nn.functional.normalize(groups.flatten(2), dim=-1)
            cosine_sums = directions.sum(1).square().sum(-1) - num_generations  # of all pairs of different members
            diversity = 1 - cosine_sums / (num_generations * (num_generations - 1))
            self._metrics[mode]["latent/diversity"].append(diversity.mean().item())
        for name, value in drawn.density.metrics().items():
            self._metrics[mode][f"latent/{name}"].append(self.accelerator.reduce(value, "mean").item())
        if self.policy.config.learn_stop:
            lengths = gather(drawn.lengths).float()
            for name in ("mean", "min", "max"):
                self._metrics[mode][f"latent/{name}_length"].append(getattr(lengths, name)().item())

    def _learn_to_prescreen(self, latents: torch.Tensor, states: torch.Tensor) -> None:
        """Say how well the value head had predicted the rewards of all processes' rows, then teach it those."""
        rollout, is_scored = self._rollout, ~self._rollout.rewards.isnan()
        latents, states = latents[is_scored], states[is_scored]
        scores, rewards, is_random = (of[is_scored] for of in (rollout.scores, rollout.rewards, rollout.is_random))
        start = time.perf_counter()
        loss = self.prescreener.learn(latents, states, rewards, seed=self._rollout_seed)
        self._metrics["train"]["time/prescreen"].append(time.perf_counter() - start)
        is_rewarded = self.prescreener.is_rewarded(rewards)
        metrics = {"loss": loss}
        for name, rows in (("random", is_random), ("selected", ~is_random)):
            metrics[f"auc_{name}"] = area_under_curve(scores[rows], is_rewarded[rows])
            metrics[f"reward_{name}"] = rewards[rows].mean().item() if rows.any() else None
        for name, value in metrics.items():
            if value is not None:
                self._metrics["train"][f"prescreening/{name}"].append(value)

    @torch.no_grad()
    def _reference_density(self, output: dict[str, Any], mode: str) -> Density:
        batch_size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        prompt = output["prompt_ids"], output["prompt_mask"], output["latents"], output["lengths"]
        rows = output["completion_mask"].any(dim=1)
        if self.ref_model is not None:
            return self._score(self.ref_model, *prompt, rows, batch_size)[0]
        with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
            return self._score(self.model, *prompt, rows, batch_size)[0]

    # ---- Loss: the density of the stored latents ----

    def _score(
        self,
        model: torch.nn.Module,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        latents: torch.Tensor,
        lengths: torch.Tensor,
        is_needed: torch.Tensor,
        batch_size: int,
        noise: torch.Tensor | None = None,
    ) -> tuple[Density, torch.Tensor | None]:
        """
        The one scoring function: density of the latent steps of the rows in need, in chunks of `batch_size`, and with
        `noise` the embeddings of latents that it draws from that density, shape `(num_rows, num_latents,
        hidden_size)`.
        """
        needed = is_needed.nonzero().squeeze(1)
        if len(needed) == 0:  # every process makes a pass, and gets zero gradients from it
            needed = needed.new_zeros(1)
        densities, embeds = [], []
        inputs = {"input_ids": prompt_ids, "attention_mask": prompt_mask, "latents": latents, "lengths": lengths}
        if noise is not None:
            inputs["noise"] = noise
        for rows in needed.split(batch_size):
            with self.accelerator.autocast():
                scored = model(**{name: tensor[rows] for name, tensor in inputs.items()})
            densities.append(scored.density)
            embeds.append(scored.latent_embeds)
        density, embeds = concatenate(densities), None if noise is None else torch.cat(embeds)
        if len(needed) < len(latents):
            density = put_rows(density, needed, len(latents))
            if noise is not None:
                embeds = embeds.new_zeros(len(latents), *embeds.shape[1:]).index_copy(0, needed, embeds)
        return density, embeds

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Log-density and entropy of every latent step, shape `(batch_size, num_latents)`: TRL's "tokens" here."""
        rollout, scoring = self._rollout, self._scoring
        if scoring is None:  # the rollout itself, before its losses
            scoring = Scoring(rollout.drawn.latents, rollout.drawn.lengths, is_needed=rollout.is_decoded)
        scoring.density, scoring.latent_embeds = self._score(
            model,
            input_ids[:, :-logits_to_keep],
            attention_mask[:, :-logits_to_keep],
            scoring.latents,
            scoring.lengths,
            scoring.is_needed,
            batch_size or scoring.latents.size(0),
            scoring.noise,
        )
        logps = scoring.density.log_prob(scoring.latents)
        if scoring.old_logps is not None:
            logps = clamp_log_ratio(logps, scoring.old_logps)
        scoring.logps = logps.detach()
        return logps, scoring.density.entropy() if compute_entropy else None, None

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        # The contrastive loss is of all trajectories, the others are of those that have a reward
        is_needed = inputs["completion_mask"].any(dim=1) | (self.args.gamma != 0.0)
        scoring = self._scoring = Scoring.of_loss(
            inputs,
            self.state.global_step,
            latents=inputs["latents"],
            lengths=inputs["lengths"],
            is_needed=is_needed,
            noise=inputs["noise"] if self.args.hybrid_coef > 0 else None,
        )
        # Every term is a mean over the rollout's rows with a reward, or over their latent steps, however these fall on
        # processes and micro-batches: what each of those has on average
        num_parts = self.accelerator.num_processes * (self.args.steps_per_generation if mode == "train" else 1)
        num_rows = inputs["num_rewarded"].clamp(min=1) / num_parts
        num_steps = inputs["num_items_in_batch"].clamp(min=1) / num_parts
        advantages = inputs["advantages"]
        if self.loss_type in MEANS_OVER_ALL_ROWS:
            advantages = advantages * (len(advantages) / num_rows)
        # The clipped surrogate of equation 7, without its KL
        loss = super()._compute_loss(model, inputs | {"advantages": advantages})
        scoring.keep(inputs)
        density, mask = scoring.density, inputs["completion_mask"]
        scale = 1.0 / self.current_gradient_accumulation_steps if mode == "train" else 1.0
        metrics = {}

        if self.kl_coef != 0.0:
            kl = density.kl(density.replace({name: inputs[f"ref_{name}"] for name in density.stored()}))
            loss = loss + self.kl_coef * scale * (kl * mask).sum() / num_steps
            metrics["latent/kl"] = kl, mask
        if self.args.gamma != 0.0:
            terms = self._contrastive_terms(density, inputs, mode)
            # Each row holds its question's whole sum, and is live in one of its G places: the rows' mean is the value
            # of equation 8, and G times that mean has its gradient
            contrastive = terms.sum(1).mean()
            gradient_only = contrastive - contrastive.detach()
            loss = loss + self.args.gamma * scale * (contrastive.detach() + terms.size(1) * gradient_only)
            metrics["latent/contrastive"] = terms.sum(1, keepdim=True), torch.ones_like(mask[:, :1])
        if self.args.hybrid_coef > 0:
            start = time.perf_counter()
            hybrid = self._hybrid_terms(scoring.latent_embeds, inputs, mask.any(dim=1))
            self._metrics[mode]["time/hybrid"].append(time.perf_counter() - start)
            loss = loss + self.args.hybrid_coef * scale * hybrid.sum() / num_rows
            metrics["latent/hybrid"] = hybrid.unsqueeze(1), mask[:, :1]
        metrics["latent/log_ratio_std"] = scoring.logps - scoring.old_logps, mask
        self._log_latent_metrics(mode, metrics)

        if mode == "train":
            # The same verdict on every process: one that skipped alone would leave the others waiting
            is_bad = (~loss.detach().isfinite()) | (inputs["num_rewarded"] == 0)
            if self._is_true_anywhere(is_bad):
                self._skip_step = True
                # A value of 0, and a gradient that is not finite, by the way that the loss would have taken: DDP waits
                # for the parameters on it and for no others. DeepSpeed and a GradScaler skip such a step by
                # themselves.
                loss = (0.0 * (loss + density.mean.sum()).nan_to_num()).sqrt()
        return loss

    def _contrastive_terms(self, density: Density, inputs: dict[str, torch.Tensor], mode: str) -> torch.Tensor:
        """Contrastive loss of each row against the stored members of its group, shape `(num_rows, G)`."""
        group_latents, group_means = (stored[inputs["group_index"]] for stored in self._groups[mode])
        return contrastive_loss(
            self.policy.features(density.rsample(inputs["noise"]), inputs["lengths"]),
            self.policy.features(density.mean, inputs["lengths"]),
            group_latents,
            group_means,
            inputs["member_index"],
            similarity=self.args.contrastive_similarity,
        )

    def _hybrid_terms(
        self, latent_embeds: torch.Tensor, inputs: dict[str, torch.Tensor], is_decoded: torch.Tensor
    ) -> torch.Tensor:
        """
        Negative advantage times mean log-likelihood of each decoded completion, shape `(num_rows,)`, 0 elsewhere. The
        latents are the stored ones, as samples of the present density: their gradient reaches projector and policy.
        """
        rows = is_decoded.nonzero().squeeze(1)
        if len(rows) == 0:  # every process makes a pass, and gets zero gradients from it
            rows = rows.new_zeros(1)
        names = "main_prompt_ids", "main_prompt_mask", "decoded_ids"
        prompt_ids, prompt_mask, decoded_ids = (inputs[name][rows] for name in names)
        embeds, lengths = latent_embeds[rows], inputs["lengths"][rows]
        anchor_ids = self.policy.config.anchor_ids
        main_inputs = teacher_forced_inputs(
            self.main_model, prompt_ids, prompt_mask, embeds, decoded_ids, lengths, anchor_ids
        )
        with align_module_device(self.main_model.get_output_embeddings()):  # its weights, where they are offloaded
            log_probs = self.main_model(**main_inputs, fused_lm_head=True).log_probs.float().to(embeds.device)
        means = log_probs.sum(1) / (decoded_ids != -100).sum(1).clamp(min=1)
        advantages = inputs.get("completion_advantages", inputs["advantages"])
        return torch.zeros_like(advantages).index_add(0, rows, -advantages[rows] * is_decoded[rows] * means)

    @torch.no_grad()
    def _log_latent_metrics(self, mode: str, metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Means (standard deviations for names in `_std`) over the unmasked entries of all processes."""
        sums = torch.stack(
            [torch.stack([(v * m).sum(), (v.square() * m).sum(), m.sum()]) for v, m in metrics.values()]
        ).float()
        for name, (total, squares, count) in zip(metrics, self.accelerator.reduce(sums, "sum").tolist(), strict=True):
            mean = total / max(count, 1)
            is_std = name.endswith("_std")
            self._metrics[mode][name].append(max(squares / max(count, 1) - mean**2, 0) ** 0.5 if is_std else mean)

    # ---- Optimization ----

    def training_step(self, model, inputs, num_items_in_batch):
        start, rollout_time = time.perf_counter(), self._rollout_time
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._optimize_time += time.perf_counter() - start - (self._rollout_time - rollout_time)
        if self.accelerator.sync_gradients:
            self._metrics["train"]["time/optimize"].append(self._optimize_time)
            self._optimize_time = 0.0
            self._finish_step()
        return loss

    def _finish_step(self) -> None:
        """Have a step skipped whose loss was bad, and stop after too many of them in a row."""
        self._metrics["train"]["skipped_steps"].append(float(self._skip_step))
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if self._skip_step else 0
        if self._skip_step and self.accelerator.scaler is None:
            # AdamW passes over weights without a gradient: neither momentum nor weight decay moves them. A GradScaler
            # insists on seeing gradients, and skips these.
            self.model.zero_grad(set_to_none=True)
        self._skip_step = False
        steps_of_rollout = self.num_iterations * self.args.steps_per_generation / self.args.gradient_accumulation_steps
        if self._skipped_in_a_row >= max(MAX_SKIPPED_STEPS, 2 * steps_of_rollout):
            self._is_stuck = self.control.should_save = self.control.should_training_stop = True

    def train(self, *args, **kwargs):
        self._is_stuck = False
        output = super().train(*args, **kwargs)
        if self._is_stuck:
            raise RuntimeError(
                f"{self._skipped_in_a_row} optimizer steps in a row had no reward at all or a loss that is not "
                "finite, so training stops. Check what the reward functions return. A checkpoint is in "
                f"{self.args.output_dir}."
            )
        return output

    # ---- Before training, and what is kept ----

    def measure_exploration(self, num_prompts: int) -> float:
        """
        Share of groups with differing rewards over the first `num_prompts` training prompts, under the policy as it
        is. Only such groups have advantages other than 0. Leaves metrics and random numbers as they were.
        """
        return fraction_mixed(self._explore(num_prompts))

    def _explore(self, num_prompts: int) -> torch.Tensor:
        """Rewards of the first prompts' groups before training, shape `(num_groups, G)`, NaN where there is none."""
        per_process = -(-num_prompts // self.accelerator.num_processes)
        size = max(1, self.args.generation_batch_size // self.accelerator.num_processes // self.num_generations)
        rows = itertools.islice(
            itertools.cycle(self.train_dataset), self.accelerator.process_index * per_process, None
        )
        rows, rewards = list(itertools.islice(rows, per_process)), []
        is_quiet = self.args.disable_tqdm or not self.accelerator.is_main_process
        metrics, tokens_seen = copy.deepcopy(self._metrics), self.state.num_input_tokens_seen
        self._decodes_all, was_training = True, self.model.training
        self.model.train()  # groups are those of training
        try:
            with torch.random.fork_rng():
                for start in tqdm(range(0, per_process, size), "Exploration check", disable=is_quiet, leave=False):
                    chunk = rows[start : start + size]  # what a rollout holds
                    inputs = [row for row in chunk for _ in range(self.num_generations)]
                    prompts = [row["prompt"] for row in inputs]
                    _, completion_ids, _, completions, *_ = self._generate(prompts)
                    self._calculate_rewards(inputs, prompts, completions, completion_ids)
                    rewards.append(self._rollout.rewards.view(-1, self.num_generations))
        finally:
            self._decodes_all = False
            self.model.train(was_training)
        self._metrics, self.state.num_input_tokens_seen = metrics, tokens_seen
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        return torch.cat(rewards)

    def _checkpoint_record(self) -> dict[str, Any]:
        record = super()._checkpoint_record()
        record["run"]["prescreening"] = self.prescreener is not None
        for name in ("num_generations", "num_iterations", "steps_per_generation"):
            record["run"][name] = getattr(self.args, name)
        # What a stored rollout has to hold
        record["run"]["loss_terms"] = [n for n in ("beta", "gamma", "hybrid_coef") if getattr(self.args, n) > 0]
        return record

    def _save_beside_policy(self, folder: str) -> None:
        if self.prescreener is not None:
            self.prescreener.save_head(folder)

    def get_eval_dataloader(self, eval_dataset=None):
        self.args.check_evaluation()
        return super().get_eval_dataloader(eval_dataset)

    def _get_train_sampler(self, dataset=None):
        self._epoch_order.sampler = super()._get_train_sampler(dataset)
        return self._epoch_order.sampler

    def _extra_state(self) -> dict[str, torch.Tensor]:
        state = super()._extra_state()
        state |= rollout_tensors(self._step, self._buffered_inputs, self._groups.get("train", ()))
        if self.prescreener is not None:
            state |= {f"prescreening.{name}": tensor for name, tensor in self.prescreener.state_tensors().items()}
        return state

    def _load_extra_state(self, tensors: dict[str, torch.Tensor]) -> None:
        super()._load_extra_state(tensors)
        self._step, self._buffered_inputs, self._groups["train"] = rollout_from_tensors(tensors)
        if self.prescreener is not None:
            self.prescreener.load_state_tensors(with_prefix(tensors, "prescreening."))

    def _load_best_model(self):
        super()._load_best_model()
        if self.prescreener is not None:
            self.prescreener.load_head(self.state.best_model_checkpoint)
