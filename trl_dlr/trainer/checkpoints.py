# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Checkpoints that are whole or not there, what they must have in common with the run that resumes from them, and what
they hold beside the model: the rollout that is being learned from, and the optimizer of a small head.
"""

import json
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast, is_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from ..models.main_model import fingerprints_match
from .callbacks import PreemptionCallback


logger = get_logger(__name__)


# No name that Trainer takes for a checkpoint, and one that pushes to the Hub leave out
UNFINISHED = "_unfinished"
RECORD_NAME = "checkpoint.json"


def unfinished_dir(run_dir: str) -> str:
    """Where what is to be in `run_dir` is written until it is whole."""
    return os.path.join(run_dir, UNFINISHED)


@contextmanager
def whole_files(folder: str) -> Iterator[str]:
    """A folder for files of `folder`: they move there, one by one, if all could be written, and vanish if not."""
    staged = unfinished_dir(folder)
    shutil.rmtree(staged, ignore_errors=True)
    os.makedirs(staged)
    try:
        yield staged
        for name in os.listdir(staged):
            _replace(os.path.join(staged, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def finish_checkpoint(staged: str, checkpoint: str, record: dict[str, Any]) -> None:
    """
    Give a checkpoint that all processes have written its name.

    Args:
        staged (`str`):
            Folder that was written.
        checkpoint (`str`):
            Its name from now on. What bore the name before goes.
        record (`dict[str, Any]`):
            What a run must have in common with this one to go on from here, kept with the sizes of all files.
    """
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(staged) for name in names]
    sizes = {os.path.relpath(path, staged): os.path.getsize(path) for path in paths}
    paths.append(os.path.join(staged, RECORD_NAME))
    with open(paths[-1], "w") as file:
        json.dump({**record, "files": sizes}, file)
    for path in paths:  # the name must not outlive a power failure that the contents do not
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    _replace(staged, checkpoint)


def _replace(source: str, target: str) -> None:
    if os.path.isdir(target):
        shutil.rmtree(target)
    os.replace(source, target)


def find_checkpoint(resume_from_checkpoint: str | bool, run_dir: str) -> str:
    """The checkpoint that `resume_from_checkpoint` names, the last one of `run_dir` for `True`."""
    if isinstance(resume_from_checkpoint, str):
        return resume_from_checkpoint
    checkpoint = get_last_checkpoint(run_dir) if os.path.isdir(run_dir) else None
    if checkpoint is None:
        raise ValueError(
            f"`resume_from_checkpoint=True`, but `output_dir={run_dir}` has no checkpoint. Name one, or start without."
        )
    return checkpoint


def check_checkpoint(checkpoint: str, record: dict[str, Any], allow_main_model_mismatch: bool = False) -> None:
    """
    Check that `checkpoint` is whole and that a run with `record` can go on from it, before anything is loaded.

    Args:
        checkpoint (`str`):
            Folder that [`finish_checkpoint`] named.
        record (`dict[str, Any]`):
            Record of the present run.
        allow_main_model_mismatch (`bool`, *optional*, defaults to `False`):
            Whether it may be of a run with another main model.

    Raises:
        `ValueError`: if it is not there, not of this trainer, incomplete, or of a run that differs.
    """
    named = f"`resume_from_checkpoint={checkpoint}`"
    try:
        with open(os.path.join(checkpoint, RECORD_NAME)) as file:
            saved = json.load(file)
        sizes = saved.pop("files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{named} is no whole checkpoint of this trainer: its `{RECORD_NAME}` cannot be read ({error!r}). Name a "
            "folder that it saved, or pass a policy alone as `model`."
        ) from error
    for name, size in sizes.items():
        path = os.path.join(checkpoint, name)
        found = os.path.getsize(path) if os.path.isfile(path) else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(
                f"{named} is damaged: `{name}` {state}, and was written with {size} bytes. Copy it again, or resume "
                "from an earlier one."
            )
    if saved["save_only_model"]:
        raise ValueError(
            f"{named} was saved with `save_only_model=True`, without what going on needs. Start anew from its policy "
            "(`model`)."
        )
    before, now = saved["main_model_fingerprint"], record["main_model_fingerprint"]
    if not allow_main_model_mismatch and None not in (before, now) and not fingerprints_match(before, now):
        raise ValueError(
            f"{named} belongs to a main model with fingerprint {before}, and `main_model` has {now}. Pass the main model "
            "that it was trained with, or set `allow_main_model_mismatch=True` to go on regardless."
        )
    for part in ("run", "policy"):
        had, has = saved[part], record[part]
        for name in {**had, **has}:
            if had.get(name) != has.get(name):
                raise ValueError(
                    f"{named} was written by another run: `{name}` was {had.get(name)} in its {part}, and is "
                    f"{has.get(name)} now. Resume it as it was, or start anew from its policy (`model`)."
                )


def share_weights(model: nn.Module) -> nn.Module:
    """`model` with the weights that it has on the first process, as DDP gives them to the model that it trains."""
    for tensor in model.state_dict().values():
        broadcast(tensor)
    return model


class WholeCheckpointsMixin:
    """
    For a [`~transformers.Trainer`]: checkpoints that are whole or not there, checked before they are resumed from, and
    one more when SIGTERM comes. A trainer adds to `_checkpoint_record` what a run must have in common with this one.
    """

    _staging_dir = None  # run folder of the checkpoint being written

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._preemption = PreemptionCallback(self._is_true_anywhere)
        self.add_callback(self._preemption)

    def _checkpoint_record(self) -> dict[str, Any]:
        """What a run must have in common with this one to go on from its checkpoints."""
        model = self.accelerator.unwrap_model(self.model)
        return {
            "main_model_fingerprint": None,
            "save_only_model": self.args.save_only_model,
            "run": {
                "trainer": type(self).__name__,
                "num_processes": self.accelerator.num_processes,
                "deepspeed": self.is_deepspeed_enabled,
                "adapter": is_peft_model(model),
                "per_device_train_batch_size": self.args.per_device_train_batch_size,
                "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            },
            "policy": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        }

    def _is_true_anywhere(self, value: bool | torch.Tensor) -> bool:
        """Whether `value` is true on any process. All of them must ask."""
        value = torch.as_tensor(value, device=self.accelerator.device).float()
        return self.accelerator.reduce(value, "sum").item() > 0

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Train, as [`~transformers.Trainer.train`] does.

        SIGTERM, by which schedulers take a machine back, lets the step end, saves a checkpoint and exits with status
        143; `resume_from_checkpoint=True` goes on from it.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint to go on from, or `True` for the last one in `args.output_dir`.
            **kwargs:
                As for [`~transformers.Trainer.train`].

        Raises:
            `ValueError`: if the checkpoint is incomplete or of a run that differs. Nothing has been loaded then.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
            may_differ = getattr(self.args, "allow_main_model_mismatch", False)
            check_checkpoint(resume_from_checkpoint, self._checkpoint_record(), may_differ)
        if self.args.should_save:  # what a killed run was writing
            shutil.rmtree(unfinished_dir(self.args.output_dir), ignore_errors=True)
        with self._preemption.listening():
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self._preemption.is_signalled or self._preemption.is_preempted:  # the former alone: after the last step
            last = get_last_checkpoint(self.args.output_dir)
            logger.warning(
                f"SIGTERM: stopped after step {self.state.global_step} of {self.state.max_steps}; saved {last}"
            )
            raise SystemExit(128 + signal.SIGTERM)
        return output

    def _get_output_dir(self, trial):
        return self._staging_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """TRL's, in a folder that gets the name of a checkpoint when every process has written its part."""
        run_dir = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging_dir, checkpoint = unfinished_dir(run_dir), os.path.join(run_dir, name)
        staged = os.path.join(staging_dir, name)
        self._staging_dir = staging_dir
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == staged:
                self.state.best_model_checkpoint = checkpoint
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
                finish_checkpoint(staged, checkpoint, self._checkpoint_record())
        except Exception as error:
            raise RuntimeError(
                f"The checkpoint of step {self.state.global_step} could not be written to {run_dir} ({error}). Those "
                "before it are whole; make room, or set `save_total_limit`, and resume."
            ) from error
        finally:
            self._staging_dir = None
            if self.args.should_save:
                shutil.rmtree(staging_dir, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if self.args.should_save:
            rotate_checkpoints(
                run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


def rollout_path(checkpoint: str, process_index: int) -> str:
    return os.path.join(checkpoint, f"rollout_{process_index}.safetensors")


def save_rollout(
    path: str, step: int, batches: Sequence[dict[str, torch.Tensor]], groups: Sequence[torch.Tensor]
) -> None:
    """
    Write a rollout.

    Args:
        path (`str`):
            File to write.
        step (`int`):
            Forward and backward passes so far, which say how much of the rollout has been used.
        batches (`Sequence[dict[str, torch.Tensor]]`):
            Micro-batches of the rollout.
        groups (`Sequence[torch.Tensor]`):
            Whole groups that the contrastive loss compares with; may be empty.
    """
    tensors = {"step": torch.tensor(step)}
    for i, batch in enumerate(batches):
        tensors.update({f"batch.{i}.{name}": tensor for name, tensor in batch.items()})
    tensors.update({f"group.{i}": tensor for i, tensor in enumerate(groups)})
    # Micro-batches are views of one tensor, which safetensors refuses
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)


def load_rollout(
    path: str, device: torch.device
) -> tuple[int, list[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]]:
    """Step, micro-batches and groups of a rollout that [`save_rollout`] wrote."""
    # safetensors does not know every name of a device, `cpu:0` for one
    tensors = {name: tensor.to(device) for name, tensor in load_file(path).items()}
    step = tensors.pop("step").item()
    batches = defaultdict(dict)
    for name in [name for name in tensors if name.startswith("batch.")]:
        _, place, key = name.split(".")
        batches[int(place)][key] = tensors.pop(name)
    return step, [batches[i] for i in sorted(batches)], tuple(tensors[name] for name in sorted(tensors))


class ResumableRolloutsMixin:
    """
    For a [`~trl.GRPOTrainer`] with tensors alone in its batches: a rollout serves several steps, so a checkpoint between
    them holds it, each process its own part, beside its state of random numbers.
    """

    _groups = {}  # what the contrastive loss compares with, by mode

    def _save_rng_state(self, output_dir: str):
        super()._save_rng_state(output_dir)
        path = rollout_path(output_dir, self.accelerator.process_index)
        save_rollout(path, self._step, self._buffered_inputs, self._groups.get("train", ()))

    def _load_rng_state(self, checkpoint: str | None):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            path = rollout_path(checkpoint, self.accelerator.process_index)
            self._step, self._buffered_inputs, groups = load_rollout(path, self.accelerator.device)
            self._groups = {**self._groups, "train": groups}


PREFIX = "optimizer."


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """State of an optimizer as named tensors, for safetensors."""
    state = optimizer.state_dict()["state"]
    return {f"{PREFIX}{i}.{name}": tensor for i, moments in state.items() for name, tensor in moments.items()}


def load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Load what [`moments_of`] returned. Tensors of other names are left alone."""
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX):
            i, key = name.removeprefix(PREFIX).split(".")
            state.setdefault(int(i), {})[key] = tensor.cpu() if key == "step" else tensor  # AdamW counts on the CPU
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
