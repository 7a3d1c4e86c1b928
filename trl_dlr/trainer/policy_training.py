# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What all trainers of a latent policy do alike: its engine, its optimizer, and how it is saved."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers.trainer import TRAINING_ARGS_NAME

from ..models import LatentPolicyModel
from ..models.hub import DEFAULT_PROMPT, location_of
from ..models.reasoner import BASE_POLICY, LatentReasoner, name_base_policy_beside, policy_below
from .callbacks import EngineCheckCallback
from .checkpoints import WholeCheckpointsMixin, whole_files
from .model_card import training_card
from .pushes import PushesMixin


logger = get_logger(__name__)


class PolicyTrainingMixin(PushesMixin, WholeCheckpointsMixin):
    """
    For a TRL trainer of a [`LatentPolicyModel`] beside a frozen `main_model`: checks the engine at the start, gives the
    projection layers their own learning rate and clipping, and saves adapters with the policy that they belong to.
    """

    ref_model = None
    _base_policy_state = None
    _base_policy_is_saved = False
    _dataset_name = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(EngineCheckCallback(self._check_engine))

    @property
    def policy(self) -> LatentPolicyModel:
        """The policy itself, without what wraps it for training, and without its adapter."""
        policy = self.accelerator.unwrap_model(self.model)
        return policy.get_base_model() if is_peft_model(policy) else policy

    @contextmanager
    def answering(self) -> Iterator[LatentReasoner]:
        """The policy and its main model as a reasoner, for as long as it answers."""
        yield LatentReasoner(self.policy, self.processing_class, self.engine, self.main_processing_class)

    @property
    def facts(self) -> dict[str, str]:
        """What a report says of the models."""
        config = self.policy.config
        main_model = config.main_model_name_or_path or "built in memory"
        return {"Main model": main_model, "Latents": f"{config.latents_in_words}, {config.sampling}"}

    def _name_base_policy(self, policy: LatentPolicyModel, output_dir: str) -> None:
        """An adapter names its base model. If this one exists nowhere yet, `_save` writes it beside the run."""
        if not policy.config.name_or_path:
            policy.name_or_path = os.path.abspath(os.path.join(output_dir, BASE_POLICY))
            self._base_policy_state = policy.state_dict()
        else:
            policy.name_or_path = location_of(policy)

    def _check_engine(self) -> None:
        """Say in what the policy is trained, and make sure of it."""
        engine = self.model_wrapped
        if not self.is_deepspeed_enabled:
            logger.info(f"{type(engine).__name__}, {self.accelerator.num_processes} processes")
            return
        from .zero2 import cast_like_engine, check_engine, clip_separately

        logger.info(check_engine(engine, self.model, self.main_model), main_process_only=False)
        if self.ref_model is not None:
            cast_like_engine(self.ref_model, engine.optimizer)
        if self.args.projection_max_grad_norm is not None:
            limits = self.args.projection_max_grad_norm, self.args.max_grad_norm
            clip_separately(engine.optimizer, self._projection_ids(self.model), *limits)

    @staticmethod
    def _is_projection(name: str) -> bool:
        return "assistant" not in name.split(".")

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        rate = self.args.projection_learning_rate
        if not is_given and (rate is not None or self.args.projection_max_grad_norm is not None):
            projection, groups = self._projection_ids(model or self.model), []
            for group in optimizer.param_groups:
                is_projection = [id(parameter) in projection for parameter in group["params"]]
                own = {} if rate is None else {"lr": rate}
                for wanted, changes in ((False, {}), (True, own)):
                    part = [p for p, found in zip(group["params"], is_projection, strict=True) if found is wanted]
                    if part:
                        groups.append({**group, "params": part, **changes})
            optimizer.param_groups = groups
        return optimizer

    def _projection_ids(self, model) -> set[int]:
        return {id(parameter) for name, parameter in model.named_parameters() if self._is_projection(name)}

    def _clip_grad_norm(self, model):
        max_norm = self.args.projection_max_grad_norm
        if max_norm is None or self.is_deepspeed_enabled:  # which has clipped in the backward pass
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        named = [(self._is_projection(name), p) for name, p in model.named_parameters() if p.grad is not None]
        norms = [
            torch.nn.utils.clip_grad_norm_(
                [p for is_projection, p in named if is_projection is wanted], limit or math.inf
            )
            for wanted, limit in ((True, max_norm), (False, self.args.max_grad_norm))
        ]
        return torch.stack(norms).norm()

    def _get_grad_norm(self, model, grad_norm=None):
        # Trainer has not clipped if `max_grad_norm` is 0
        if grad_norm is None and self.args.projection_max_grad_norm is not None:
            grad_norm = self._clip_grad_norm(model)
        return super()._get_grad_norm(model, grad_norm)

    def _checkpoint_record(self) -> dict[str, Any]:
        record, config = super()._checkpoint_record(), self.policy.config
        record["main_model_fingerprint"] = config.main_model_fingerprint
        of_config = {name: getattr(config, name) for name in self.args.policy_kwargs()}
        record["policy"] = {**of_config, **record["policy"]}
        return record

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        if self._base_policy_state is not None:
            with whole_files(self.policy.name_or_path) as folder:
                self.policy.save_pretrained(folder, state_dict=self._base_policy_state)
                self.processing_class.save_pretrained(folder)
            self._base_policy_state, self._base_policy_is_saved = None, True
        with whole_files(output_dir or self.args.output_dir) as folder:
            super()._save(folder, state_dict)
            os.remove(os.path.join(folder, TRAINING_ARGS_NAME))  # a pickle; the card names what it held
            if is_peft_model(self.accelerator.unwrap_model(self.model)):
                self.policy.config.save_pretrained(folder)  # for what reads a model by its configuration
            self._save_beside_policy(folder)
            self._write_card(folder)
            self._saved_names = os.listdir(folder)

    def _save_beside_policy(self, folder: str) -> None:
        """For what else a trainer has trained."""

    def _write_card(self, folder: str, tags: list[str] | None = None) -> None:
        policy, prompt = self.policy, DEFAULT_PROMPT  # not one of the dataset's, which may be private
        if isinstance(self.train_dataset, Dataset) and not isinstance(self.train_dataset[0]["prompt"], str):
            prompt = [{"role": "user", "content": DEFAULT_PROMPT}]
        card = training_card(
            self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            policy.config,
            self.args,
            self._name,
            self._paper,
            [*self._tag_names, *(tags or [])],
            is_adapter=is_peft_model(self.accelerator.unwrap_model(self.model)),
            dataset_name=self._dataset_name,
            prompt=prompt,
        )
        Path(folder, "README.md").write_text(card, encoding="utf-8")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the card of the policy to `args.output_dir`.

        Args:
            model_name (`str`, *optional*):
                Part of TRL's signature; the card bears the name of the repository.
            dataset_name (`str`, *optional*):
                Dataset that the policy was trained on. If `None`, the one that was named before.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        if not self.is_world_process_zero():
            return
        self._dataset_name = dataset_name or self._dataset_name
        os.makedirs(self.args.output_dir, exist_ok=True)
        self._write_card(self.args.output_dir, [tags] if isinstance(tags, str) else tags)

    def _complete_for_push(self) -> None:
        """Beside an adapter that is pushed lies the policy that it belongs to, wherever that came from."""
        model, folder = self.accelerator.unwrap_model(self.model), os.path.join(self.args.output_dir, BASE_POLICY)
        if is_peft_model(model):
            if not self._base_policy_is_saved:
                with whole_files(folder) as staged:
                    policy_below(model).save_pretrained(staged)
                self._base_policy_is_saved = True
            name_base_policy_beside(self.args.output_dir, self.hub_model_id or BASE_POLICY)
