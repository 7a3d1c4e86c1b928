# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import textwrap
import time
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import entropy_from_logits, pad

from ..generation.text import (
    StopStrings,
    as_completions,
    check_prompts,
    check_tokenizers,
    decode_completions,
    tokenize_prompts,
)
from ..models.architectures import check_can_think
from ..models.hub import hub_arguments, name_or_model
from ..models.main_model import disable_dropout
from ..models.soft_tokens import SOFT_TOKEN_SCORES
from ..models.thinking import Thinker, ThinkingOptions, Thoughts, check_positions, is_latent, positions
from .checkpoints import CheckpointsMixin, rollout_from_tensors, rollout_tensors, share_weights
from .inputs import (
    as_reward_funcs,
    check_adapter,
    check_chat_templates,
    check_datasets,
    check_gold_answers,
    check_vocabulary,
    config_or_default,
    load_tokenizer,
    longest_prompts,
    refuse_arguments,
    refuse_fsdp,
)
from .losses import Scoring, clamp_log_ratio, shape_advantages
from .soft_token_grpo_config import SoftTokenGRPOConfig
from .thinking_training import ThinkingTrainingMixin, init_kwargs_were_used, load_causal_lm, reference_is_a_copy


class SoftTokenGRPOTrainer(ThinkingTrainingMixin, CheckpointsMixin, GRPOTrainer):
    r"""
    Trainer for a language model that thinks in soft tokens before it answers in tokens, as proposed in the papers
    [LEPO](https://huggingface.co/papers/2604.17892) and [Latent-GRPO](https://huggingface.co/papers/2604.27998).

    At a latent position the model's own next-token distribution, perturbed by Gumbel noise, becomes a mixture of token
    embeddings, which is the next input. Then it answers in ordinary tokens. One GRPO loss is over both: a latent
    position is scored by the density of its mixture or a surrogate of it (`soft_token_score`), a token position by its
    log-probability. With `latent_type="hidden_states"` the latents are the model's last hidden states (Coconut), are
    not drawn, and are no part of the loss ([2512.11816](https://huggingface.co/papers/2512.11816)).

    Unlike in [`LatentGRPOTrainer`], there is no second model: the one that thinks also answers, and is trained as a
    whole or by LoRA.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_dlr import SoftTokenGRPOTrainer
    >>> from trl_dlr.rewards import correctness_reward

    >>> dataset = load_dataset("openai/gsm8k", "main", split="train").rename_column("question", "prompt")

    >>> trainer = SoftTokenGRPOTrainer(
    ...     model="Qwen/Qwen2.5-1.5B-Instruct",
    ...     reward_funcs=correctness_reward,
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal LM to train, as in [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc | list[RewardFunc]`):
            Reward functions, as in [`~trl.GRPOTrainer`]. They see the answer, without latents and end marker.
        args ([`SoftTokenGRPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with a column `"prompt"`, standard or conversational, as in [`~trl.GRPOTrainer`].
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], [`~datasets.DatasetDict`], [`~datasets.IterableDatasetDict`] or `dict[str, Dataset | IterableDataset]`, *optional*):
            Dataset to use for evaluation. It must meet the same requirements as `train_dataset`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, the one saved with the model.
        reward_processing_classes ([`~transformers.PreTrainedTokenizerBase`] or `list[PreTrainedTokenizerBase]`, *optional*):
            Processing classes of reward models, as in [`~trl.GRPOTrainer`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model that is loaded by name.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration.
        tools, rollout_func, environment_factory:
            Part of [`~trl.GRPOTrainer`]'s signature; refused, since a completion is thought and answered in one turn.

    Raises:
        `ValueError`: if an argument does not fit, with its name, the value seen and what would be right.
    """

    _tag_names = ["trl", "trl_dlr", "latent-reasoning", "soft-tokens"]
    _name = "Soft-token GRPO"
    _paper = {
        "title": "LEPO: Latent Reasoning Policy Optimization for Large Language Models",
        "id": "2604.17892",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhou2026lepo,
                title        = {{LEPO: Latent Reasoning Policy Optimization for Large Language Models}},
                author       = {Yuyan Zhou and Jiarui Yu and Hande Dong and Zhezheng Hao and Hong Wang and Jianqing Zhang and Qiang Lin},
                year         = 2026,
                eprint       = {arXiv:2604.17892},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: Any = None,
        args: SoftTokenGRPOConfig | None = None,
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
    ):
        refused = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        refuse_arguments(type(self).__name__, "a completion is thought and answered in one turn", **refused)
        model = name_or_model(model, "model")
        args = config_or_default(args, SoftTokenGRPOConfig, model, "SoftTokenGRPO")
        refuse_fsdp(args)
        check_tokenizers(processing_class=processing_class)
        check_datasets(train_dataset, eval_dataset, args)
        check_gold_answers(reward_funcs, train_dataset, eval_dataset)
        check_adapter(model, peft_config)
        hub = hub_arguments(args.model_init_kwargs, args.trust_remote_code)
        if processing_class is None:
            processing_class = load_tokenizer(model, "processing_class", **hub)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_chat_templates(dataset, name, args.chat_template_kwargs, processing_class=processing_class)
        is_named = isinstance(model, str)
        if is_named:
            model, quantization_config = load_causal_lm(model, args, quantization_config), None
        check_can_think(model)
        check_vocabulary(model, processing_class, "processing_class")
        if args.freeze_embeddings:
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.requires_grad_(False)
        config = model.config.get_text_config()
        self.thinker = Thinker(args.thinking_config(), processing_class, config.vocab_size)
        thought_length = args.num_latents + len(self.thinker.end_ids)
        for prompts in longest_prompts(train_dataset, eval_dataset):
            length = max(map(len, tokenize_prompts(prompts, processing_class, args.chat_template_kwargs)))
            length += len(self.thinker.start_ids)
            check_positions(config, length, thought_length, args.max_completion_length)

        with init_kwargs_were_used() if is_named else nullcontext(), reference_is_a_copy(model):
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
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        if args.disable_dropout:
            disable_dropout(self.model)
        if self.aux_loss_enabled:
            with torch.no_grad():
                token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
                aux_loss = getattr(self.model(input_ids=token, output_router_logits=True), "aux_loss", None)
            if not isinstance(aux_loss, torch.Tensor):
                raise ValueError(
                    f"`router_aux_loss_coef` must be 0 for a model of the family {config.model_type}, got "
                    f"{self.router_aux_loss_coef}: transformers computes no balancing loss for it."
                )
        if self.ref_model is not None:
            share_weights(self.ref_model)
        # Dr. GRPO divides by the longest completion, of which latents and end marker are a part
        self.max_completion_length += thought_length
        self._soft_token_score = SOFT_TOKEN_SCORES[args.soft_token_score]

        # Beside the configuration of tokens, and with it in another form
        stop_strings, self.generation_config.stop_strings = self.generation_config.stop_strings, None
        self._stop_strings = None if stop_strings is None else StopStrings(stop_strings, processing_class)

        # What the hooks below hand to each other between a rollout and its loss
        self._thoughts = None  # of the rows being generated
        self._num_appended = None  # end tokens that they were given after a stop string
        self._inputs = None  # rows of the dataset that are being generated for
        self._rewards = None  # total rewards of all processes' rows, NaN where there is none
        self._drawn_rewards = None  # of a rollout with groups that were drawn anew, until TRL asks for them
        self._scoring: Scoring | None = None  # of the latest loss, `None` while there is a rollout

    def get_eval_dataloader(self, eval_dataset=None):
        self.args.check_evaluation()
        return super().get_eval_dataloader(eval_dataset)

    # ---- Rollout: latents, then tokens ----

    def _tokenize_prompts(self, prompts: list):
        check_prompts(prompts, "The dataset, in this rollout,")  # only the first rows of a stream were looked at
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        return [ids + self.thinker.start_ids for ids in prompt_ids], images, multimodal_fields

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if images is not None:
            raise ValueError(f"`{type(self).__name__}` reads text alone, but the dataset has images.")
        mode, start = "train" if self.model.training else "eval", time.perf_counter()
        ids = [torch.tensor(row) for row in prompt_ids]
        input_ids = pad(ids, padding_value=self._tokenizer.pad_token_id, padding_side="left")
        attention_mask = pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="left")
        prompts = input_ids.to(self.accelerator.device), attention_mask.to(self.accelerator.device)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self.accelerator.autocast(),
        ):
            thoughts = self._thoughts = self.thinker.think(model, *prompts)
            thought = time.perf_counter()
            embeds = self.thinker.latents.embed(model.get_input_embeddings(), **thoughts.latents)
            settings = self.generation_config, self._stop_strings
            answers = self.thinker.answer(model, *prompts, embeds, thoughts.lengths, *settings)
        eos = torch.tensor(self.eos_token_ids, device=answers.device)
        is_after_eos = torch.isin(answers, eos).int().cumsum(1) - torch.isin(answers, eos).int() > 0
        answer_ids = [row[~after].tolist() for row, after in zip(answers, is_after_eos, strict=True)]
        self._num_appended = [0] * len(answer_ids)
        if self._stop_strings is not None:
            # An answer that one has ended is closed with an end token, which TRL looks for, and which is not trained
            # on
            written = [self._stop_strings.cut(ids) for ids in answer_ids]
            self._num_appended = [
                int(ids[-1] not in self.eos_token_ids and self._stop_strings.are_in(ids)) for ids in written
            ]
            answer_ids = [ids + self.eos_token_ids[:n] for ids, n in zip(written, self._num_appended, strict=True)]
        self._log_thoughts(mode, thoughts)
        self._metrics[mode]["time/think"].append(thought - start)
        self._metrics[mode]["time/answer"].append(time.perf_counter() - thought)
        return answer_ids, None

    def _log_thoughts(self, mode: str, thoughts: Thoughts) -> None:
        lengths, has_ended = gather(thoughts.lengths).float(), gather(thoughts.has_ended).float()
        for name, value in (("mean", lengths.mean()), ("min", lengths.min()), ("max", lengths.max())):
            self._metrics[mode][f"latent/{name}_length"].append(value.item())
        self._metrics[mode]["latent/ended_fraction"].append(has_ended.mean().item())

    def _generate(self, prompts: list):
        drawn = self._draw(prompts)
        return self._draw_anew(prompts, drawn) if self.model.training and self.args.max_redraws > 0 else drawn

    def _draw(self, prompts: list) -> tuple:
        prompt_ids, answer_ids, _, _, *others = super()._generate(prompts)
        completions = as_completions(decode_completions(answer_ids, self._tokenizer, self.eos_token_ids), prompts)
        end_ids, lengths = self.thinker.end_ids, self._thoughts.lengths.tolist()
        placeholder, is_scored = self.thinker.placeholder_id, int(self.thinker.latents.is_scored)
        completion_ids = [[placeholder] * n + end_ids + ids for n, ids in zip(lengths, answer_ids, strict=True)]
        # TRL's mask of what the model itself has chosen: no marker that was put there, and no latent that is not drawn
        marked = [int(chosen and self.args.end_marker_in_loss) for chosen in self._thoughts.has_ended.tolist()]
        tool_mask = [
            [is_scored] * n + ([mark] + [0] * len(end_ids))[: len(end_ids)] + [1] * (len(ids) - cut) + [0] * cut
            for n, mark, ids, cut in zip(lengths, marked, answer_ids, self._num_appended, strict=True)
        ]
        return prompt_ids, completion_ids, tool_mask, completions, *others

    def _draw_anew(self, prompts: list, drawn: tuple) -> tuple:
        """
        Groups whose rewards are all alike, which teach nothing, are drawn again. Processes draw equally many, since they
        gather what they log: where one has fewer such groups, it draws others beside them, and leaves them.
        """
        inputs, thoughts, num_redrawn = self._inputs, self._thoughts, 0
        rewards = self._calculate_rewards(inputs, prompts, drawn[3], drawn[1])
        size, rank = self.num_generations, self.accelerator.process_index
        for _ in range(self.args.max_redraws):
            groups = self._total_rewards(rewards).view(self.accelerator.num_processes, -1, size)
            is_alike = groups.amax(-1) == groups.amin(-1)  # of all processes, shape (num_processes, num_groups)
            number = int(is_alike.sum(1).max())
            if number == 0:
                break
            num_redrawn += int(is_alike.sum())
            first = is_alike.int().argsort(dim=1, descending=True, stable=True)[:, :number]
            of_all = (first.unsqueeze(-1) * size + torch.arange(size, device=first.device)).flatten(1)
            is_kept = is_alike.gather(1, first).repeat_interleave(size, dim=1)
            rows = of_all[rank].tolist()
            again = self._draw([prompts[row] for row in rows])
            of_rows = [inputs[row] for row in rows], [prompts[row] for row in rows], again[3], again[1]
            logged, self._pending_extra_logs = self._pending_extra_logs, defaultdict(list)
            new = self._calculate_rewards(*of_rows)
            places = of_all + torch.arange(len(of_all), device=of_all.device).unsqueeze(1) * len(prompts)
            rewards[places[is_kept]] = new.view(*is_kept.shape, -1)[is_kept]
            own = [(row, i) for i, (row, kept) in enumerate(zip(rows, is_kept[rank].tolist(), strict=True)) if kept]
            again_logged, self._pending_extra_logs = self._pending_extra_logs, logged  # columns beside completions
            columns = [(logged.setdefault(name, [None] * len(prompts)), row) for name, row in again_logged.items()]
            for values, others in [*zip(drawn[:4], again[:4], strict=True), *columns]:
                for row, i in own:
                    values[row] = others[i]
            thoughts = thoughts.with_rows(self._thoughts, own)
        self._thoughts, self._drawn_rewards = thoughts, rewards
        self._metrics["train"]["redrawn_groups"].append(num_redrawn / len(rewards) * size)
        return drawn

    def _total_rewards(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        """Weighted sums, NaN for rows that no function has judged."""
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        return rewards.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self._drawn_rewards is not None:  # which decided what is drawn anew
            rewards, self._drawn_rewards = self._drawn_rewards, None
            self._rewards = self._total_rewards(rewards)
            return rewards
        skipped = [n + len(self.thinker.end_ids) for n in self._thoughts.lengths.tolist()]
        answer_ids = [ids[n:] for ids, n in zip(completion_ids_list, skipped, strict=True)]
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, answer_ids)
        self._rewards = self._total_rewards(rewards_per_func)
        return rewards_per_func

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._scoring, self._inputs = None, inputs
        output = super()._generate_and_score_completions(inputs)
        thoughts = self._thoughts
        output |= {f"latent_{name}": stored for name, stored in thoughts.latents.items()}
        output["latent_lengths"] = thoughts.lengths
        output["rollout_step"] = torch.tensor(self.state.global_step, device=self.accelerator.device)
        if self.args.first_latent_selection and "old_per_token_logps" not in output:
            output["old_per_token_logps"], *_ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                self.args.per_device_train_batch_size,
            )
        mask, log_probs = output["completion_mask"] * output["tool_mask"], output.get("old_per_token_logps")
        shape_advantages(
            output,
            self.args,
            self.accelerator,
            self.num_generations if self.model.training else self.num_generations_eval,
            rewards=self._rewards,
            is_valid=thoughts.has_ended,
            log_probs=log_probs,
            mask=mask,
            logged=self._logs["advantages"],
        )
        return output

    # ---- Loss: latent positions and token positions ----

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
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Scores of latent positions and log-probabilities of token positions, shape `(batch_size, logits_to_keep)`.
        """
        # The rollout itself, before its losses, has no scoring of its own
        scoring = self._scoring or Scoring(self._thoughts.latents, self._thoughts.lengths)
        latents, lengths = scoring.latents, scoring.lengths
        embed_tokens = self.accelerator.unwrap_model(model).get_input_embeddings()
        prompt_ids, completion_ids = input_ids[:, :-logits_to_keep], input_ids[:, -logits_to_keep:]
        scored = []
        for rows in torch.arange(len(input_ids), device=input_ids.device).split(batch_size or len(input_ids)):
            row_latents = {name: stored[rows] for name, stored in latents.items()}
            ids, mask = (prompt_ids[rows], completion_ids[rows]), attention_mask[rows]
            with self.accelerator.autocast():
                output = model(
                    inputs_embeds=self.thinker.embed_prompt_and_completion(
                        embed_tokens, *ids, row_latents, lengths[rows]
                    ),
                    attention_mask=mask,
                    position_ids=positions(mask),
                    logits_to_keep=logits_to_keep + 1,
                    use_cache=False,
                    **({"output_router_logits": True} if compute_aux_loss else {}),
                )
            logits = output.logits[:, :-1].float()
            logits_of_tokens, entropies = logits / self.temperature, None
            if compute_entropy:  # only TRL's entropy bonus has a gradient
                with torch.set_grad_enabled(torch.is_grad_enabled() and self._entropy_bonus_enabled):
                    entropies = entropy_from_logits(logits_of_tokens)
            logps = logits_of_tokens.log_softmax(-1).gather(-1, ids[1].unsqueeze(-1)).squeeze(-1)
            if self.thinker.latents.is_scored:
                logps = self._put_latent_scores(logps, logits, row_latents, lengths[rows])
            scored.append((logps, entropies, output.aux_loss if compute_aux_loss else None))
        logps, entropies, aux_losses = zip(*scored, strict=True)
        logps = torch.cat(logps)
        if scoring.old_logps is not None:
            logps = self._relative_to_old(logps, scoring.old_logps, lengths)
        scoring.logps = logps.detach()
        aux_loss = torch.stack(aux_losses).mean() if compute_aux_loss else None
        return logps, torch.cat(entropies) if compute_entropy else None, aux_loss

    def _put_latent_scores(
        self, logps: torch.Tensor, logits: torch.Tensor, latents: dict[str, torch.Tensor], lengths: torch.Tensor
    ) -> torch.Tensor:
        """Scores of the latents in their places, which are a completion's first."""
        longest = min(latents["perturbed"].size(1), logits.size(1))
        token_ids, perturbed = latents["token_ids"][:, :longest], latents["perturbed"][:, :longest]
        candidates = logits[:, :longest].log_softmax(-1).gather(-1, token_ids)
        scores = self._soft_token_score(perturbed, candidates, self.args.soft_token_temperature)
        first = torch.where(is_latent(lengths, longest), scores, logps[:, :longest])
        return torch.cat([first, logps[:, longest:]], dim=1)

    def _relative_to_old(self, logps: torch.Tensor, old_logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """
        Bounded log-ratios of latents. LEPO's have none: the value stays the old one, the gradient is the score's.
        """
        of_latents = clamp_log_ratio(logps, old_logps)
        if self.args.soft_token_score == "lepo":
            of_latents = old_logps + (logps - logps.detach())
        return torch.where(is_latent(lengths, logps.size(1)), of_latents, logps)

    def _compute_loss(self, model, inputs):
        names = [name for name in inputs if name.startswith("latent_") and name != "latent_lengths"]
        scoring = self._scoring = Scoring.of_loss(
            inputs,
            self.state.global_step,
            latents={name.removeprefix("latent_"): inputs[name] for name in names},
            lengths=inputs["latent_lengths"],
        )
        loss = super()._compute_loss(model, inputs)
        scoring.keep(inputs)
        return loss

    # ---- Checkpoints ----

    def _checkpoint_record(self) -> dict[str, Any]:
        record = super()._checkpoint_record()
        names = ("num_generations", "num_iterations", "steps_per_generation", "soft_token_score")
        for name in (*names, *ThinkingOptions.__dataclass_fields__):
            record["run"][name] = getattr(self.args, name)
        record["run"]["loss_terms"] = ["beta"] * (self.args.beta > 0)  # whose parts a stored rollout has to hold
        return record

    def _extra_state(self) -> dict[str, torch.Tensor]:
        return super()._extra_state() | rollout_tensors(self._step, self._buffered_inputs)

    def _load_extra_state(self, tensors: dict[str, torch.Tensor]) -> None:
        super()._load_extra_state(tensors)
        self._step, self._buffered_inputs, _ = rollout_from_tensors(tensors)
