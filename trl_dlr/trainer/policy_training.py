# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What all trainers of a latent policy do alike: its engine, its optimizer, and how it is saved."""

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi
from transformers.trainer import TRAINING_ARGS_NAME, HubStrategy
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import PushInProgress

from ..models import LatentPolicyModel
from ..models.hub import DEFAULT_PROMPT, describe_push_failure, readable_push_errors
from ..models.reasoner import BASE_POLICY, name_base_policy_beside, policy_below
from .callbacks import EngineCheckCallback
from .checkpoints import WholeCheckpointsMixin, whole_files
from .model_card import training_card


logger = get_logger(__name__)


class PolicyTrainingMixin(WholeCheckpointsMixin):
    """
    For a TRL trainer of a [`LatentPolicyModel`] beside a frozen `main_model`: checks the engine at the start, gives the
    projection layers their own learning rate and clipping, and saves adapters with the policy that they belong to.
    """

    ref_model = None
    _base_policy_state = None
    _dataset_name = None
    _saved_names = ()  # files that a policy was last saved as

    def __init__(self, *args, **kwargs):
        self._hub = HfApi()  # one for all uploads, which it does one after the other
        super().__init__(*args, **kwargs)
        self.add_callback(EngineCheckCallback(self._check_engine))

    @property
    def policy(self) -> LatentPolicyModel:
        """The policy itself, without what wraps it for training, and without its adapter."""
        policy = self.accelerator.unwrap_model(self.model)
        return policy.get_base_model() if is_peft_model(policy) else policy

    def _name_base_policy(self, policy: LatentPolicyModel, output_dir: str) -> None:
        """An adapter names its base model. If this one exists nowhere yet, `_save` writes it beside the run."""
        if not policy.config.name_or_path:
            policy.name_or_path = os.path.abspath(os.path.join(output_dir, BASE_POLICY))
            self._base_policy_state = policy.state_dict()

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
            torch.nn.utils.clip_grad_norm_([p for is_projection, p in named if is_projection is wanted], limit)
            for wanted, limit in ((True, max_norm), (False, self.args.max_grad_norm))
        ]
        return torch.stack(norms).norm()

    def _checkpoint_record(self) -> dict[str, Any]:
        """What a run must have in common with this one to go on from its checkpoints."""
        config, whole = self.policy.config, self.accelerator.unwrap_model(self.model)
        of_config = ("latent_dim", "num_latents", "sampling", "learn_sigma", "normalize_mean")
        return {
            "main_model_fingerprint": config.main_model_fingerprint,
            "save_only_model": self.args.save_only_model,
            "run": {
                "trainer": type(self).__name__,
                "num_processes": self.accelerator.num_processes,
                "deepspeed": self.is_deepspeed_enabled,
                "adapter": is_peft_model(whole),
                "per_device_train_batch_size": self.args.per_device_train_batch_size,
                "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            },
            "policy": {
                **{name: getattr(config, name) for name in of_config},
                **{name: list(tensor.shape) for name, tensor in whole.state_dict().items()},
            },
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        if self._base_policy_state is not None:
            with whole_files(self.policy.name_or_path) as folder:
                self.policy.save_pretrained(folder, state_dict=self._base_policy_state)
            self._base_policy_state = None
        with whole_files(output_dir or self.args.output_dir) as folder:
            super()._save(folder, state_dict)
            os.remove(os.path.join(folder, TRAINING_ARGS_NAME))  # a pickle; the card names what it held
            self._save_beside_policy(folder)
            self._write_card(folder)
            self._saved_names = os.listdir(folder)

    def _save_beside_policy(self, folder: str) -> None:
        """For what else a trainer has trained."""

    # ---- The Hub ----

    def _write_card(self, folder: str, tags: list[str] | None = None) -> None:
        policy, prompt = self.policy, DEFAULT_PROMPT
        if isinstance(self.train_dataset, Dataset) and "prompt" in self.train_dataset.column_names:
            prompt = self.train_dataset[0]["prompt"]
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

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As [`~transformers.Trainer.init_hf_repo`]; `args.hub_revision` becomes a branch if it is none yet."""
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with readable_push_errors(name):
            super().init_hf_repo(token=token, private=private)
            if self.args.hub_revision is not None:
                self._create_branch(self.args.hub_revision, token)

    def _create_branch(self, revision: str, token: str | None) -> None:
        if self.is_world_process_zero():
            token = token if token is not None else self.args.hub_token
            self._hub.create_branch(self.hub_model_id, branch=revision, token=token, exist_ok=True)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """
        Save the policy to `args.output_dir` and upload that folder, without checkpoints. Arguments are those of
        [`~transformers.Trainer.push_to_hub`].

        Raises:
            `RuntimeError`: if the upload failed, with the reason and what to do. What was saved is whole.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()  # which reads the files that are saved now
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._save_base_policy()
        self.create_model_card(**kwargs)
        with readable_push_errors(self.hub_model_id, self._what_is_left):
            if revision is not None:
                self._create_branch(revision, token)
            job = self._upload(self.args.output_dir, None, commit_message, token, revision)
            if blocking:
                return job.result()
        job.add_done_callback(self._warn_of_failed_push)
        return job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint's policy in the background, and with `hub_strategy` the checkpoint. Failures are logged."""
        if self._staging_dir is not None:  # what is pushed has its name
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_under_way = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_under_way and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with whole_files(self.args.output_dir) as folder:
            for name in self._saved_names:
                source, target = os.path.join(checkpoint_folder, name), os.path.join(folder, name)
                (shutil.copytree if os.path.isdir(source) else shutil.copy)(source, target)
        self._save_base_policy()
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(self.args.output_dir, None, message)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if is_last else os.path.basename(checkpoint_folder)
            jobs.append(self._upload(checkpoint_folder, name, f"{message}, checkpoint"))
        for job in jobs:
            job.add_done_callback(self._warn_of_failed_push)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if is_under_way else []), *jobs])

    def _upload(
        self,
        folder: str,
        path_in_repo: str | None,
        commit_message: str,
        token: str | None = None,
        revision: str | None = None,
    ) -> Future:
        """Upload a folder in the background, after what is being uploaded."""
        return self._hub.upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=commit_message,
            token=token if token is not None else self.args.hub_token,
            revision=revision if revision is not None else self.args.hub_revision,
            ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"],
            run_as_future=True,
        )

    def _save_base_policy(self) -> None:
        """Beside an adapter that is pushed lies the policy that it belongs to, wherever that came from."""
        model, folder = self.accelerator.unwrap_model(self.model), os.path.join(self.args.output_dir, BASE_POLICY)
        if is_peft_model(model):
            if not os.path.isdir(folder):
                with whole_files(folder) as staged:
                    policy_below(model).save_pretrained(staged)
            name_base_policy_beside(self.args.output_dir)

    @property
    def _what_is_left(self) -> str:
        return f"Its files are complete in {self.args.output_dir}."

    def _warn_of_failed_push(self, job: Future) -> None:
        if not job.cancelled() and job.exception() is not None:
            logger.warning(describe_push_failure(job.exception(), self.hub_model_id, self._what_is_left))
