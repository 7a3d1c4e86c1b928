# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What all trainers of a latent policy do alike: its engine, its optimizer, and how it is saved."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers.trainer import TRAINING_ARGS_NAME

from ..models import LatentPolicyModel
from ..models.hub import location_of
from ..models.latent_policy_config import DENSITIES
from ..models.reasoner import BASE_POLICY, LatentReasoner
from .callbacks import EngineCheckCallback
from .checkpoints import WholeCheckpointsMixin, whole_files
from .pushes import PolicyPushesMixin


logger = get_logger(__name__)


class PolicyTrainingMixin(PolicyPushesMixin, WholeCheckpointsMixin):
    """
    For a TRL trainer of a [`LatentPolicyModel`] beside a frozen `main_model`: checks the engine at the start, gives the
    projection layers their own learning rate and clipping, and saves adapters with the policy that they belong to.
    """

    ref_model = None
    _base_policy_state = None

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
        of_config = ("latent_dim", "num_latents", "sampling", "learn_sigma", "normalize_mean")
        of_config += ("learn_stop", "min_latents")
        if config.density == "soft_tokens":
            of_config += DENSITIES["soft_tokens"]
        record["policy"] = {**{name: getattr(config, name) for name in of_config}, **record["policy"]}
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
