# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import copy
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.data.data_collator import DataCollatorMixin
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from ..evaluation.controls import score_answers
from ..generation import tokenize_prompts
from ..generation.engine import end_token_ids
from ..generation.text import check_tokenizers, decode_completions
from ..models.architectures import base_model_of, check_can_think
from ..models.hidden_thoughts import add_hidden_thoughts
from ..models.hub import hub_arguments, name_or_model, readable_damage
from ..models.main_model import eval_mode
from ..models.thinking import Thinker, ThinkingConfig, check_positions, positions
from ..rewards import correctness_reward
from .checkpoints import CheckpointsMixin
from .coconut_sft_config import END_LATENT, MARKERS, START_LATENT, CoconutSFTConfig
from .curriculum import (
    Curriculum,
    add_markers,
    check_worked_datasets,
    stage_generator,
    tokenize_completions,
    tokenize_worked_answers,
    train_markers,
    with_worked_columns,
)
from .inputs import check_adapter, check_chat_templates, check_vocabulary, config_or_default, refuse_fsdp
from .losses import OWN_LOGITS
from .thinking_training import ThinkingTrainingMixin, load_causal_lm


logger = get_logger(__name__)


@dataclass
class CoconutCollator(DataCollatorMixin):
    """
    Pads questions on the left and worked answers on the right. A stage puts latents between the two.

    Args:
        pad_token_id (`int`):
            Padding of the questions. That of the answers is -100.
    """

    pad_token_id: int
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        questions = [torch.tensor(example["input_ids"]) for example in examples]

        def padded(name: str, value: int) -> torch.Tensor:
            return pad_sequence([torch.tensor(example[name]) for example in examples], True, value)

        return {
            "input_ids": pad_sequence(questions, True, self.pad_token_id, "left"),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in questions], True, 0, "left"),
            "completion_ids": padded("completion_ids", -100),
            "step_index": padded("step_index", -1),
        }


def pad_around(before: list[list[int]], after: list[list[int]], value: int) -> torch.Tensor:
    """Rows in two halves that meet in the same column, padded on both sides."""
    halves = (before, "left"), (after, "right")
    return torch.cat(
        [pad_sequence([torch.tensor(row) for row in rows], True, value, side) for rows, side in halves], dim=1
    )


class CoconutSFTTrainer(ThinkingTrainingMixin, CheckpointsMixin, SFTTrainer):
    r"""
    Trainer for Coconut ([Training Large Language Models to Reason in a Continuous Latent
    Space](https://huggingface.co/papers/2412.06769)): a language model whose own last hidden states are its thoughts.

    In stage s the first s reasoning steps of an answer are replaced by latents, and the loss is on what is left of it.
    The input at a latent position is the last hidden state of the position before, through which the gradient flows.
    What it saves is an ordinary causal LM and its tokenizer, with a [`~models.thinking.ThinkingConfig`] beside them
    that says how the model thinks.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_dlr import CoconutSFTTrainer

    >>> rows = [{"prompt": "What is 2 + 3 + 4?", "steps": ["2 + 3 = 5", "5 + 4 = 9"], "completion": "#### 9"}]
    >>> trainer = CoconutSFTTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     train_dataset=Dataset.from_list(rows),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal LM to train: Hub id, path or instance. An instance gets the marker tokens that it lacks.
        args ([`CoconutSFTConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`]):
            Dataset with columns `"prompt"`, `"steps"` and `"completion"`, standard or conversational; `"question"` and
            `"answer"` are taken for the first and the last. Steps are a list of texts that come before the completion.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Held-out questions. Beside the loss, `eval_accuracy` says how often greedy answers are right by
            `reward_func`, with the latents of the present stage.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, the one saved with `model`.
        reward_func (`Callable`, *optional*, defaults to [`~rewards.correctness_reward`]):
            Reward above 0 for a right answer. It is given the column `"answer"`, or `"completion"` under that name. In
            stages before the last, an answer begins with the steps that are left, so a mark before its result (such as
            `#### `, which the default understands) tells them apart.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model that is loaded by name.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration. The embeddings of the markers are trained beside the adapter and saved with it
            (`trainable_token_indices`), unless `modules_to_save` has the whole table.

    Raises:
        `ValueError`: if an argument does not fit, with its name, the value seen and what would be right.
    """

    latent_type = "hidden_states"
    _tag_names = ["trl", "trl_dlr", "latent-reasoning", "coconut"]
    _name = "Coconut"
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
        args: CoconutSFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_func: Callable[..., list[float]] = correctness_reward,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        model = name_or_model(model, "model")
        args = config_or_default(args, CoconutSFTConfig, model, "Coconut")
        refuse_fsdp(args)
        check_tokenizers(processing_class=processing_class)
        check_worked_datasets(train_dataset, eval_dataset)
        check_adapter(model, peft_config)
        hub = hub_arguments(args.model_init_kwargs, args.trust_remote_code)
        if isinstance(model, str):
            # Loaded here, so that it knows the markers before an adapter is put on it
            model = load_causal_lm(model, args, quantization_config)
            args = copy.copy(args)
            args.model_init_kwargs = quantization_config = None
        if processing_class is None:
            name = get_config_model_id(model.config)
            if not name:
                raise ValueError(
                    "`processing_class` must be given: `model` was built in memory and names no tokenizer."
                )
            with readable_damage(name):
                processing_class = AutoTokenizer.from_pretrained(name, **hub)
        check_can_think(model)
        if (family := model.config.get_text_config().model_type) in OWN_LOGITS:
            raise ValueError(
                f"`model` is of the family {family}, whose logits are more than its head's, and TRL's supervised loss, "
                "which is trained with, does not know them. Take a model of another family."
            )
        check_vocabulary(model, processing_class, "processing_class")
        if processing_class.eos_token is None:
            raise ValueError("`processing_class` has no `eos_token`, which ends an answer. Set one.")
        self.marker_ids = add_markers(model, processing_class, MARKERS)
        if peft_config is not None and not isinstance(model, PeftModel):
            peft_config = train_markers(peft_config, model, self.marker_ids)
        if args.pad_token is not None and args.pad_token not in processing_class.get_vocab():
            raise ValueError(f"`pad_token` must be a token of `processing_class`, got {args.pad_token!r}.")
        processing_class.pad_token = args.pad_token or processing_class.pad_token or processing_class.eos_token
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
        model.generation_config.pad_token_id = processing_class.pad_token_id

        self._end_token_ids = end_token_ids(model.generation_config, processing_class)
        self._model_config = model.config
        self.reward_func = reward_func
        self.curriculum = Curriculum(args, args.cot_epochs)
        super().__init__(
            model=model,
            args=args,
            data_collator=CoconutCollator(processing_class.pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.add_callback(self.curriculum)
        if self.aux_loss_enabled:
            raise ValueError(
                f"`router_aux_loss_coef` must be 0 for a mixture of experts, got {self.router_aux_loss_coef}: its "
                "balancing loss counts tokens of one pass, and latents take several."
            )
        head = self.model.get_output_embeddings()
        if isinstance(
            head, TrainableTokensWrapper
        ):  # of tied embeddings: TRL reads its bias, which PEFT does not pass on
            vars(head)["bias"] = head.token_adapter.base_layer.bias
        causal_lm = base_model_of(self.model)
        add_hidden_thoughts(causal_lm)

    # ---- Data ----

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        dataset = with_worked_columns(dataset, dataset_name, args.num_stages)
        check_chat_templates(dataset, f"{dataset_name}_dataset", processing_class=processing_class)

        num_inserted = args.latents_of(args.num_stages) + 2  # latents and markers
        limits = {f"`max_length={args.max_length}` tokens": args.max_length}
        limits["the model's positions"] = getattr(
            self._model_config.get_text_config(), "max_position_embeddings", None
        )

        def tokenize(rows: dict[str, list]) -> dict[str, list]:
            prompts = tokenize_prompts(rows["prompt"], processing_class)
            return {"input_ids": prompts, **tokenize_completions(rows, processing_class, self._end_token_ids)}

        def lengths_of(row: dict[str, Any]) -> list[int]:
            return [len(row["input_ids"]) + num_inserted + len(row["completion_ids"])] * len(limits)

        dataset = tokenize_worked_answers(dataset, dataset_name, args, tokenize, lengths_of, limits)
        if dataset_name != "train":  # whose questions are answered
            longest = max(map(len, dataset["input_ids"]))
            check_positions(self._model_config, longest, num_inserted, args.max_completion_length)
        return dataset

    def _set_signature_columns_if_needed(self):
        # The last two are for the evaluation of answers
        self._signature_columns = ["input_ids", "completion_ids", "step_index", "prompt", "answer"]

    # ---- Curriculum ----

    def _at_stage(
        self, inputs: dict[str, torch.Tensor], generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """
        `[question ; start ; latents ; end ; what is left]`, and without latents `[question ; worked answer]`. Latents
        of all rows end in the same column, so that they share columns and all labels come behind them, in the last
        pass.
        """
        prompts, mask, completion_ids = inputs["input_ids"], inputs["attention_mask"].bool(), inputs["completion_ids"]
        stages = self.curriculum.draw_stages(len(prompts), generator).to(prompts.device)
        left = self.curriculum.what_is_left(completion_ids, inputs["step_index"], stages)
        start, latent, end = self.marker_ids
        before, after, is_latent, labels = [], [], [], []
        for prompt, is_there, stage, rest in zip(prompts, mask, stages.tolist(), left, strict=True):
            num_latents, targets = self.args.latents_of(stage), rest[rest != -100].tolist()
            opening, closing = ([start], [end]) if num_latents > 0 else ([], [])
            before.append([*prompt[is_there].tolist(), *opening, *[latent] * num_latents])
            after.append([*closing, *targets])
            is_latent.append([*[0] * (len(before[-1]) - num_latents), *[1] * num_latents])
            labels.append([*[-100] * len(closing), *targets])
        no_label, no_latent = ([[value] * len(row) for row in rows] for value, rows in ((-100, before), (0, after)))
        attention_mask = pad_around(*([[1] * len(row) for row in rows] for rows in (before, after)), 0)
        staged = {
            "input_ids": pad_around(before, after, self.processing_class.pad_token_id),
            "attention_mask": attention_mask,
            "position_ids": positions(attention_mask),
            "is_latent": pad_around(is_latent, no_latent, 0).bool(),
            "labels": pad_around(no_label, labels, -100),
        }
        return {name: tensor.to(prompts.device) for name, tensor in staged.items()}

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        # Trainer counts the labels of a step here
        self.curriculum.begin_step(self.state, self.optimizer)
        generator = stage_generator(self)
        staged = (self._at_stage(inputs, generator) for inputs in epoch_iterator)
        return super().get_batch_samples(staged, num_batches, device)

    # ---- Loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = self._at_stage(inputs) if "completion_ids" in inputs else inputs
        self._metrics["train" if self.model.training else "eval"]["latent/stage"].append(self.curriculum.stage)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    # ---- Evaluation ----

    @property
    def thinking_config(self) -> ThinkingConfig | None:
        """How the model thinks in the present stage. `None` in stage 0: it does not."""
        num_latents = self.args.latents_of(self.curriculum.stage)
        if num_latents == 0:
            return None
        return ThinkingConfig(
            self.latent_type,
            num_latents,
            start_marker=START_LATENT,
            end_marker=END_LATENT,
            max_completion_length=self.args.max_completion_length,
        )

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Trainer's, and how often greedy answers are right."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        rewards = score_answers(dataloader.dataset, self._answer(dataloader.dataset), self.reward_func)
        output.metrics[f"{metric_key_prefix}_accuracy"] = (rewards[~rewards.isnan()] > 0).float().mean().item()
        return output

    @torch.no_grad()
    def _answer(self, dataset: Dataset) -> list[list[str]]:
        """The greedy answer to each question, in every process. Each takes its share of them."""
        model, tokenizer, thinking = self.model, self.processing_class, self.thinking_config
        vocab_size = model.get_output_embeddings().weight.size(0)
        thinker = Thinker(thinking or ThinkingConfig(self.latent_type), tokenizer, vocab_size)
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.args.max_completion_length,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=self._end_token_ids,
        )
        answers, size, embed_tokens = [], self.args.per_device_eval_batch_size, model.get_input_embeddings()
        with PartialState().split_between_processes(list(dataset["input_ids"])) as questions, eval_mode(model):
            for start in range(0, len(questions), size):
                rows = [torch.tensor([*ids, *thinker.start_ids]) for ids in questions[start : start + size]]
                ids = pad_sequence(rows, True, tokenizer.pad_token_id, "left").to(model.device)
                mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left").to(model.device)
                latents, lengths = embed_tokens(ids[:, :0]), torch.zeros_like(ids[:, 0])
                if thinking is not None:
                    thoughts = thinker.think(model, ids, mask, deterministic=True)
                    latents, lengths = thinker.latents.embed(embed_tokens, **thoughts.latents), thoughts.lengths
                tokens = thinker.answer(model, ids, mask, latents, lengths, greedy)
                texts = decode_completions(tokens.tolist(), tokenizer, self._end_token_ids)
                answers += [[text] for text in texts]
        return gather_object(answers)

    # ---- Checkpoints ----

    def _checkpoint_record(self) -> dict[str, Any]:
        record = super()._checkpoint_record()
        for name in (*Curriculum.RECORDED, "max_latents", "cot_epochs"):
            record["run"][name] = getattr(self.args, name)
        return record

    def _load_best_model(self):
        super()._load_best_model()
        self.curriculum.go_to_checkpoint(self.state.best_model_checkpoint)
