# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.data.data_collator import DataCollatorMixin
from trl import SFTTrainer
from trl.trainer.utils import pad

from ..evaluation.controls import evaluate_latents
from ..generation import TransformersEngine, tokenize_prompts
from ..models.architectures import base_model_of
from ..models.hub import name_or_model
from ..models.main_model import disable_dropout, teacher_forced_inputs
from ..reasoners.latent_reasoner import LatentReasoner
from ..rewards import correctness_reward
from .checkpoints import CheckpointsMixin
from .curriculum import (
    Curriculum,
    check_worked_datasets,
    stage_generator,
    tokenize_completions,
    tokenize_worked_answers,
    with_worked_columns,
)
from .inputs import check_chat_templates, config_or_default
from .latent_sft_config import LatentSFTConfig
from .losses import add_likelihoods
from .policy_training import PolicyTrainingMixin, adapter_for_policy, assemble, check_optimizer


NUM_EVAL_SAMPLES = 4  # trajectories of a held-out question


@dataclass
class LatentSFTCollator(DataCollatorMixin):
    """
    Pads questions on the left and completions on the right.

    Args:
        pad_token_id (`int`):
            Padding of the assistant's tokens. The main model's padding is masked.
    """

    pad_token_id: int
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        def padded(name: str, value: int, side: str) -> torch.Tensor:
            return pad([torch.tensor(example[name]) for example in examples], padding_value=value, padding_side=side)

        def mask(name: str) -> torch.Tensor:
            return pad([torch.ones(len(example[name]), dtype=torch.long) for example in examples], padding_side="left")

        return {
            "input_ids": padded("assistant_ids", self.pad_token_id, "left"),
            "attention_mask": mask("assistant_ids"),
            "prompt_ids": padded("prompt_ids", 0, "left"),
            "prompt_mask": mask("prompt_ids"),
            "completion_ids": padded("completion_ids", -100, "right"),
            "step_index": padded("step_index", -1, "right"),
        }


class LatentSFTTrainer(PolicyTrainingMixin, CheckpointsMixin, SFTTrainer):
    r"""
    Trainer for the supervised start of a latent policy: the negative log-likelihood of gold completions under the
    frozen main model that has been given the policy's latents.

    The gradient passes through the frozen main model into projector, latent head and assistant. With `num_stages`, the
    worked steps of an answer are replaced by latents stage by stage, in the manner of Coconut
    ([2412.06769](https://huggingface.co/papers/2412.06769)). What it saves is a [`LatentPolicyModel`], the `model` of
    [`LatentGRPOTrainer`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_dlr import LatentSFTTrainer

    >>> dataset = Dataset.from_list([{"prompt": "What is 2 + 3?", "completion": "5"}])

    >>> trainer = LatentSFTTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     main_model="Qwen/Qwen2.5-7B-Instruct",
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to train, or the assistant of a new one, as in [`LatentGRPOTrainer`].
        args ([`LatentSFTConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with columns `"prompt"` and `"completion"`, standard or conversational, or `"question"` and
            `"answer"`. A curriculum needs `"steps"` as well, a list of texts that come before the completion, and no
            stream. Rows longer than `max_length`, latents included, or than a model has positions for are left out.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Held-out questions. Beside the loss, `eval_accuracy` says how often answers decoded from *sampled* latents
            are right by `reward_func`, with all latents in every stage, as the policy is used; an
            [`~transformers.EarlyStoppingCallback`] with `metric_for_best_model="accuracy"` stops on it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the assistant. If `None`, the one saved with `model`, or the main model's if the assistant was
            made from it.
        reward_func (`Callable`, *optional*, defaults to [`~rewards.correctness_reward`]):
            Reward above 0 for a right answer. It is given the column `"answer"`, or `"completion"` under that name.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of the frozen main model when it is loaded by name.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration for the assistant. The projection layers stay trainable and are saved with the adapter.
        main_model (`str` or [`~transformers.PreTrainedModel`]):
            Causal LM that reads the latents. It is frozen, and is no part of the optimizer or of checkpoints.
        main_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the main model. If `None`, the one saved with it.

    Raises:
        `ValueError`: if an argument does not fit, with its name, the value seen and what would be right.
    """

    _tag_names = ["trl", "trl_dlr", "latent-reasoning", "latent-sft"]
    _name = "Latent SFT"
    _paper = {
        "title": "Training Large Language Models to Reason in a Continuous Latent Space",
        "id": "2412.06769",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{hao2024training,
                title        = {{Training Large Language Models to Reason in a Continuous Latent Space}},
                author       = {Shibo Hao and Sainbayar Sukhbaatar and DiJia Su and Xian Li and Zhiting Hu and Jason Weston and Yuandong Tian},
                year         = 2024,
                eprint       = {arXiv:2412.06769},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: LatentSFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_func: Callable[..., list[float]] = correctness_reward,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        main_model: str | PreTrainedModel,
        main_processing_class: PreTrainedTokenizerBase | None = None,
    ):
        model = name_or_model(model, "model")
        args = config_or_default(args, LatentSFTConfig, model, "LatentSFT")
        model, main_model, main_processing_class, processing_class = assemble(
            model, main_model, main_processing_class, processing_class, args, quantization_config
        )
        policy = base_model_of(model)
        if args.num_stages > 0 and policy.config.num_latents != args.num_stages * args.latents_per_stage:
            raise ValueError(
                f"`num_stages={args.num_stages}` with `latents_per_stage={args.latents_per_stage}` needs a policy of "
                f"{args.num_stages * args.latents_per_stage} latents, but `model` has {policy.config.num_latents}."
            )
        check_optimizer(optimizers[0], main_model, args)
        check_worked_datasets(train_dataset, eval_dataset)
        if peft_config is not None and not isinstance(model, PeftModel):
            peft_config = adapter_for_policy(policy, peft_config)
            self._name_base_policy(policy, args.output_dir)

        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # a stage of one latent feeds none back

        self.main_processing_class = main_processing_class
        self.engine = TransformersEngine(main_model, main_processing_class, args.max_completion_length)
        self.reward_func = reward_func
        self._num_latents, self._max_prompt_length = policy.config.num_latents, policy.max_prompt_length
        self.curriculum = Curriculum(args)
        super().__init__(
            model=model,
            args=args,
            data_collator=LatentSFTCollator(processing_class.pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self.add_callback(self.curriculum)

        self.main_model = main_model.requires_grad_(False).eval()
        if not (getattr(main_model, "is_quantized", False) or hasattr(main_model, "hf_device_map")):
            self.main_model.to(self.accelerator.device)
        # Per-token log-likelihoods in TRL's form, and gradient checkpointing where the gradient passes
        add_likelihoods(self.main_model, outputs=("log_probs", "entropy", "is_top1"))
        if args.gradient_checkpointing:
            disable_dropout(self.main_model)
            self.main_model.gradient_checkpointing_enable({"use_reentrant": False})

    # ---- Data: the assistant's reading of the question, the main model's, and what it is to write ----

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        dataset = with_worked_columns(dataset, dataset_name, args.num_stages)
        kwargs = args.chat_template_kwargs
        tokenizers = {"processing_class": processing_class, "main_processing_class": self.main_processing_class}
        check_chat_templates(dataset, f"{dataset_name}_dataset", kwargs, **tokenizers)

        limits = {
            f"`max_length={args.max_length}` tokens": args.max_length,
            "the main model's positions": self.engine.max_positions,
            "the assistant's positions": self._max_prompt_length,
        }

        def tokenize(rows: dict[str, list]) -> dict[str, list]:
            return {
                "assistant_ids": tokenize_prompts(rows["prompt"], processing_class, kwargs),
                "prompt_ids": tokenize_prompts(rows["prompt"], self.main_processing_class, kwargs),
                **tokenize_completions(rows, self.main_processing_class, self.engine.eos_token_ids, kwargs),
            }

        def lengths_of(row: dict[str, Any]) -> list[int]:
            length = len(row["prompt_ids"]) + self._num_latents + len(row["completion_ids"])
            return [length, length, len(row["assistant_ids"])]

        dataset = tokenize_worked_answers(dataset, dataset_name, args, tokenize, lengths_of, limits)
        if dataset_name != "train":  # whose questions are answered
            self.engine.check_length(max(map(len, dataset["prompt_ids"])), self._num_latents)
        return dataset

    def _set_signature_columns_if_needed(self):
        # The last two are for the evaluation of decoded answers
        self._signature_columns = ["assistant_ids", "prompt_ids", "completion_ids", "step_index", "prompt", "answer"]

    # ---- Curriculum ----

    def _at_stage(
        self, inputs: dict[str, torch.Tensor], generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """
        `labels` (after a first -100, which is for the position before them) as the present stage has them, and mixed
        with other stages if there is a `generator` to choose them.
        """
        inputs = dict(inputs)
        ids, step_index = inputs.pop("completion_ids"), inputs.pop("step_index")
        if self.args.num_stages > 0:
            stages = self.curriculum.draw_stages(len(ids), generator).to(ids.device)
            ids = self.curriculum.what_is_left(ids, step_index, stages)
            inputs["num_latents"] = stages * self.args.latents_per_stage
        inputs["labels"] = torch.nn.functional.pad(ids, (1, 0), value=-100)
        return inputs

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        # Trainer counts the labels of a step here
        self.curriculum.begin_step(self.state, self.optimizer)
        generator = stage_generator(self)
        staged = (self._at_stage(inputs, generator) for inputs in epoch_iterator)
        return super().get_batch_samples(staged, num_batches, device)

    # ---- Loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        inputs = self._at_stage(inputs) if "completion_ids" in inputs else inputs
        labels, prompt_ids = inputs["labels"][:, 1:], inputs["prompt_ids"]
        config = self.policy.config
        num_latents = inputs.get("num_latents", torch.full_like(prompt_ids[:, 0], config.num_latents))
        shape = len(labels), int(num_latents.max()), config.latent_dim
        noise = self.policy.draw_noise(shape)  # reparameterized samples, as reinforcement learning will draw them
        drawn = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], noise=noise)

        embeds = drawn.latent_embeds
        main_inputs = teacher_forced_inputs(
            self.main_model, prompt_ids, inputs["prompt_mask"], embeds, labels, num_latents, config.anchor_ids
        )
        lm_head = self.main_model.get_output_embeddings()  # which is where the loss is calculated
        with self._checkpointing_main_model(), align_module_device(lm_head):  # with its weights, if they are offloaded
            if isinstance(num_items_in_batch, torch.Tensor):
                num_items_in_batch = num_items_in_batch.to(lm_head.weight.device)
            result = super().compute_loss(self.main_model, main_inputs, return_outputs, num_items_in_batch)
        loss, *outputs = result if return_outputs else (result,)
        loss = loss.to(embeds.device)

        is_used = torch.arange(shape[1], device=labels.device) < num_latents.unsqueeze(1)
        size = drawn.density.size()[is_used]
        self._metrics[mode]["latent/mean_size"].append(self.accelerator.gather(size.detach().mean()).mean().item())
        if self.args.mean_bound > 0 and config.latent_density == "gaussian":
            excess = (size - self.args.mean_bound).clamp(min=0).square().mean()
            self._metrics[mode]["latent/mean_excess"].append(self.accelerator.gather(excess.detach()).mean().item())
            if mode == "train":
                steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
                loss = loss + excess / steps
        return (loss, *outputs) if return_outputs else loss

    @contextmanager
    def _checkpointing_main_model(self) -> Iterator[None]:
        """Layers are only checkpointed in training mode, which is without effect otherwise: dropout is off."""
        self.main_model.train(self.args.gradient_checkpointing and self.model.training)
        try:
            yield
        finally:
            self.main_model.eval()

    # ---- Evaluation ----

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Trainer's, and how often answers decoded from sampled latents are right."""
        with torch.random.fork_rng():  # neither takes from training's random numbers nor depends on them
            torch.manual_seed(self.args.seed)
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        reasoner = LatentReasoner(self.policy, self.processing_class, self.engine, self.main_processing_class)
        metrics = evaluate_latents(
            reasoner,
            dataloader.dataset,
            self.reward_func,
            num_samples=NUM_EVAL_SAMPLES,
            batch_size=self.args.per_device_eval_batch_size,
            seed=self.args.seed,
        )
        output.metrics.update({f"{metric_key_prefix}_{name}": metrics[name] for name in ("accuracy", "pass_at_k")})
        return output

    # ---- Checkpoints ----

    def _checkpoint_record(self) -> dict[str, Any]:
        record = super()._checkpoint_record()
        for name in Curriculum.RECORDED:
            record["run"][name] = getattr(self.args, name)
        return record

    def _load_best_model(self):
        super()._load_best_model()
        self.curriculum.go_to_checkpoint(self.state.best_model_checkpoint)
