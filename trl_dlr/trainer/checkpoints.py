# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Checkpoints that are whole or not there, what they must have in common with the run that resumes from them, and what
they hold beside the model: the rollout that is being learned from, and the optimizer of a small head.
"""

import json
import os
import re
import shutil
import signal
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast, broadcast_object_list, gather_object, set_seed
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from ..models.architectures import base_model_of
from ..models.main_model import fingerprints_match
from .callbacks import PreemptionCallback


logger = get_logger(__name__)


# No name that Trainer takes for a checkpoint, and one that pushes to the Hub leave out
UNFINISHED = "_unfinished"
RECORD_NAME = "checkpoint.json"
EXTRA_STATE_NAME = "extra_state_{}.safetensors"  # one file a process
OF_A_PROCESS = re.compile(r"(extra_state_|rng_state_|zero_pp_rank_)\d+")
FORMAT = 2  # of what a checkpoint holds
SHARES = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
SECONDS_TO_APPEAR = 10  # of a file, on the other nodes of a network's disk


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


def check_shared(folder: str, save_on_each_node: bool) -> None:
    """
    Check that the processes which are to share a folder do.

    Args:
        folder (`str`):
            Folder of the run.
        save_on_each_node (`bool`):
            Whether the nodes have disks of their own, or share one.

    Raises:
        `ValueError`: if it is the other way round: checkpoints would be in parts that nobody can resume from, or
            written over each other.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    (token,) = broadcast_object_list([uuid.uuid4().hex])
    mark = os.path.join(folder, f".{token}_{{}}")
    writes = (state.local_process_index if save_on_each_node else state.process_index) == 0
    if writes:
        os.makedirs(folder, exist_ok=True)
        Path(mark.format(state.process_index)).touch()
    writers = gather_object([state.process_index] if writes else [])
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not (seen := [i for i in writers if os.path.exists(mark.format(i))]) and time.monotonic() < deadline:
        time.sleep(0.5)
    everyone = gather_object([seen])
    if writes:
        os.remove(mark.format(state.process_index))
    for process, found in enumerate(everyone):
        if not found:
            raise ValueError(
                f"`output_dir={folder}` is not one folder for all processes: process {process} does not see what "
                f"process {writers[0]} writes there. Give a folder that the nodes share, or set "
                "`save_on_each_node=True` if each has disks of its own."
            )
        if len(found) > 1:
            raise ValueError(
                f"`save_on_each_node=True`, but processes {found} write to the same `output_dir={folder}`, over each "
                "other's files. Leave it unset where nodes share a folder, or give each node one of its own."
            )


def find_checkpoint(resume_from_checkpoint: str | os.PathLike | bool, run_dir: str) -> str:
    """
    The checkpoint that `resume_from_checkpoint` names, for `True` the last one in `run_dir` that all processes have.
    """
    if isinstance(resume_from_checkpoint, (str, os.PathLike)):
        return os.fspath(resume_from_checkpoint)
    if resume_from_checkpoint is not True:
        raise ValueError(
            "`resume_from_checkpoint` must be the folder of a checkpoint, or `True` for the last one, got "
            f"{resume_from_checkpoint!r}."
        )
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    numbers = [int(name.split("-")[-1]) for name in names if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name)]
    paths = {number: os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{number}") for number in numbers}
    saves = {(number, save_of(path)) for number, path in paths.items()}
    everywhere = set.intersection(*gather_object([saves]))  # a node may have been lost as the others finished
    if not everywhere:
        raise ValueError(
            f"`resume_from_checkpoint=True`, but `output_dir={run_dir}` has no checkpoint"
            + (" that all processes have" if saves else "")
            + ". Name one, or start without."
        )
    return paths[max(number for number, _ in everywhere)]


def save_of(checkpoint: str) -> str | None:
    """What all processes' parts of one save have in common, and no other save has."""
    try:
        with open(os.path.join(checkpoint, RECORD_NAME)) as file:
            return json.load(file)["save"]
    except (OSError, ValueError, KeyError, TypeError):  # which is said when it is to be resumed from
        return None


def check_checkpoint(
    checkpoint: str, record: dict[str, Any], process_index: int, allow_main_model_mismatch: bool = False
) -> dict[str, Any]:
    """
    Check that `checkpoint` is whole and that a run with `record` can go on from it, before anything is loaded.

    Args:
        checkpoint (`str`):
            Folder that [`finish_checkpoint`] named.
        record (`dict[str, Any]`):
            Record of the present run.
        process_index (`int`):
            Process of the present run that asks.
        allow_main_model_mismatch (`bool`, *optional*, defaults to `False`):
            Whether it may be of a run with another main model.

    Returns:
        `dict[str, Any]`: its record. That run may have had another number of processes, which shared the same batches.

    Raises:
        `ValueError`: if it is not there, not of this trainer, incomplete, or of a run that differs.
    """
    named = f"`resume_from_checkpoint={checkpoint}`"
    try:
        with open(os.path.join(checkpoint, RECORD_NAME)) as file:
            saved = json.load(file)
        sizes, runs, policies = (dict(saved[name]) for name in ("files", "run", "policy"))
        save_only_model, before = saved["save_only_model"], saved["main_model_fingerprint"]
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
    if save_only_model:
        raise ValueError(
            f"{named} was saved with `save_only_model=True`, without what going on needs. Start anew from its policy "
            "(`model`)."
        )
    now = record["main_model_fingerprint"]
    if not allow_main_model_mismatch and None not in (before, now) and not fingerprints_match(before, now):
        raise ValueError(
            f"{named} belongs to a main model with fingerprint {before}, and `main_model` has {now}. Pass the main "
            "model that it was trained with, or set `allow_main_model_mismatch=True` to go on regardless."
        )
    run = record["run"]
    is_shared_otherwise = runs.get("format") == FORMAT and runs["num_processes"] != run["num_processes"]
    if is_shared_otherwise:
        runs, run = batches_of(runs), batches_of(run)
    for part, had, has in (("run", runs, run), ("policy", policies, record["policy"])):
        for name in {**had, **has}:
            if had.get(name) != has.get(name):
                raise ValueError(
                    f"{named} was written by another run: `{name}` was {had.get(name)} in its {part}, and is "
                    f"{has.get(name)} now. Resume it as it was, or start anew from its policy (`model`)."
                )
    for process in range(saved["run"]["num_processes"]) if is_shared_otherwise else [process_index]:
        for name in {OF_A_PROCESS.sub(rf"\g<1>{process}", name) for name in sizes if OF_A_PROCESS.search(name)}:
            if not os.path.isfile(os.path.join(checkpoint, name)):
                raise ValueError(
                    f"{named} lacks `{name}`, which is on the disk of another node. Start the nodes in the order that "
                    "they had (`machine_rank`), or copy the folders of all nodes into one."
                )
    return saved


def rows_of(run: dict[str, Any]) -> int:
    """Rows of a pass of all processes."""
    return run["num_processes"] * run["per_device_train_batch_size"]


def batches_of(run: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of a run, with the batches of all its processes together instead of each one's share."""
    num_rows = rows_of(run)
    batches = {"batch_size": num_rows * run["gradient_accumulation_steps"]}
    if "steps_per_generation" in run:
        batches["generation_batch_size"] = num_rows * run["steps_per_generation"]
    return {**{name: value for name, value in run.items() if name not in SHARES}, **batches}


def share_weights(model: nn.Module) -> nn.Module:
    """`model` with the weights that it has on the first process, as DDP gives them to the model that it trains."""
    for tensor in model.state_dict().values():
        broadcast(tensor)
    return model


class CheckpointsMixin:
    """
    For a TRL trainer: checkpoints that are whole or not there, checked before they are resumed from, and one more when
    SIGTERM comes. A trainer adds to `_checkpoint_record` what a run must have in common with this one, and to
    `_extra_state` and `_load_extra_state` what it keeps beside its model.
    """

    _staging_dir = None  # run folder of the checkpoint being written
    _other_run = None  # whose checkpoint is resumed from, if it had another number of processes

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_shared(self.args.output_dir, self.args.save_on_each_node)
        if self.args.save_on_each_node and self.args.should_save:  # transformers lets the first process alone write it
            base_model_of(self.accelerator.unwrap_model(self.model)).should_save_on_this_rank = bool
        self._preemption = PreemptionCallback(self._is_true_anywhere)
        self.add_callback(self._preemption)

    def _checkpoint_record(self) -> dict[str, Any]:
        """What a run must have in common with this one to go on from its checkpoints."""
        model = self.accelerator.unwrap_model(self.model)
        return {
            "main_model_fingerprint": None,
            "save_only_model": self.args.save_only_model,
            "run": {
                "format": FORMAT,
                "trainer": type(self).__name__,
                "num_processes": self.accelerator.num_processes,
                "deepspeed": self.is_deepspeed_enabled,
                "adapter": isinstance(model, PeftModel),
                "per_device_train_batch_size": self.args.per_device_train_batch_size,
                "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            },
            "policy": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        }

    def _is_true_anywhere(self, value: bool | torch.Tensor) -> bool:
        """Whether `value` is true on any process. All of them must ask."""
        value = torch.as_tensor(value, device=self.accelerator.device).float()
        return self.accelerator.reduce(value, "sum").item() > 0

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, **kwargs):
        """
        Train, as [`~transformers.Trainer.train`] does.

        SIGTERM, by which schedulers take a machine back, lets the step end, saves a checkpoint and exits with status
        143; `resume_from_checkpoint=True` goes on from it.

        Args:
            resume_from_checkpoint (`str`, `os.PathLike` or `bool`, *optional*):
                Checkpoint to go on from, or `True` for the last one in `args.output_dir`.
            **kwargs:
                As for [`~transformers.Trainer.train`].

        Raises:
            `ValueError`: if the checkpoint is incomplete or of a run that differs. Nothing has been loaded then.
        """
        self._other_run = None
        if resume_from_checkpoint is not None and resume_from_checkpoint is not False:
            resume_from_checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if self.args.should_save:  # what a killed run was writing
            shutil.rmtree(unfinished_dir(self.args.output_dir), ignore_errors=True)
        if self._other_run is not None:
            logger.warning(
                f"{resume_from_checkpoint} was written by another number of processes, and there are "
                f"{self.accelerator.num_processes} now: model, optimizer and counters go on; a rollout in which it "
                "stands is drawn again, and random numbers are others."
            )
        if self.is_deepspeed_enabled:
            options = self.accelerator.state.deepspeed_plugin.deepspeed_config.setdefault("checkpoint", {})
            options["load_universal"] = self._other_run is not None
            if self._other_run is not None:
                resume_from_checkpoint = self._universal_checkpoint(resume_from_checkpoint)
        try:
            with self._preemption.listening():
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except Exception as error:
            self._say_where_it_stands(error)
            raise
        if self._preemption.is_signalled or self._preemption.is_preempted:  # the former alone: after the last step
            last = get_last_checkpoint(self.args.output_dir)
            logger.warning(
                f"SIGTERM: stopped after step {self.state.global_step} of {self.state.max_steps}; saved {last}"
            )
            raise SystemExit(128 + signal.SIGTERM)
        return output

    def _say_where_it_stands(self, error: Exception) -> None:
        folder, num_processes = self.args.output_dir, self.accelerator.num_processes
        if num_processes > 1:
            last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
            logger.error(
                f"Process {self.accelerator.process_index} of {num_processes} ends after step "
                f"{self.state.global_step} with {type(error).__name__}. If it has lost a connection, another process "
                f"or its node was gone before, and the log there says why. Its last checkpoint is {last}; "
                "`resume_from_checkpoint=True` goes on from the last that all processes have.",
                main_process_only=False,
            )

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool) -> str:
        """Folder of the checkpoint that is named so; a `ValueError` if it is incomplete or of a run that differs."""
        checkpoint, refusal, save = find_checkpoint(resume_from_checkpoint, self.args.output_dir), None, None
        may_differ = getattr(self.args, "allow_main_model_mismatch", False)
        try:
            saved = check_checkpoint(checkpoint, self._checkpoint_record(), self.accelerator.process_index, may_differ)
            save = saved.get("save")
            if saved["run"]["num_processes"] != self.accelerator.num_processes:
                self._other_run = saved["run"]
        except ValueError as error:
            refusal = error
        # Nodes may have checkpoints of their own: what one refuses, none takes
        refusals, saves = zip(*gather_object([(refusal and str(refusal), save)]), strict=True)
        if any(refusals):
            raise refusal or ValueError(next(filter(None, refusals)))
        if len(set(saves)) > 1:
            raise ValueError(
                f"`resume_from_checkpoint={checkpoint}` is not the same on all nodes: their parts are of different "
                "saves. Name a checkpoint that they have saved together, or set it to `True` for the last one."
            )
        return checkpoint

    def _universal_checkpoint(self, checkpoint: str) -> str:
        """`checkpoint` with DeepSpeed's part in the format that any number of processes can load."""
        from .deepspeed import make_universal

        folder = os.path.join(unfinished_dir(self.args.output_dir), "universal", os.path.basename(checkpoint))
        if self.args.should_save:
            make_universal(checkpoint, folder)
        self.accelerator.wait_for_everyone()
        return folder

    def _extra_state(self) -> dict[str, torch.Tensor]:
        """
        What this process goes on with beside model, optimizer and random numbers, by name. A trainer adds its own.
        """
        return {}

    def _load_extra_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on with what `_extra_state` has returned."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_deepspeed_enabled and self.args.should_save:  # which writes this on the first process alone
            Path(output_dir, "latest").write_text(f"global_step{self.model_wrapped.global_steps}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        index = 0 if self._other_run is not None else self.accelerator.process_index
        path = os.path.join(checkpoint, EXTRA_STATE_NAME.format(index))
        if os.path.isfile(path):
            # safetensors does not know every name of a device, `cpu:0` for one
            tensors = {n: tensor.to(self.accelerator.device) for n, tensor in load_file(path).items()}
            if self._other_run is not None and "rollout.step" in tensors:  # all else is alike on all processes
                before, now = (rows_of(run) for run in (self._other_run, self._checkpoint_record()["run"]))
                step = tensors["rollout.step"].item() * before // now
                tensors = {n: tensor for n, tensor in tensors.items() if not n.startswith("rollout.")}
                tensors |= rollout_tensors(step, ())
            self._load_extra_state(tensors)
        if self._other_run is not None and self.is_deepspeed_enabled:
            self.model_wrapped._config.load_universal_checkpoint = False  # this one alone was
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                shutil.rmtree(unfinished_dir(self.args.output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._other_run is not None:
            set_seed(self.args.seed + self.state.global_step, device_specific=True)
        else:
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            # The weights alone: DeepSpeed would load an optimizer too, and no other number of processes' part of it
            tag = Path(self.state.best_model_checkpoint, "latest").read_text()
            is_whole = not isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
            self.model_wrapped.load_checkpoint(
                self.state.best_model_checkpoint, tag, load_module_strict=is_whole, load_module_only=True
            )
            return
        super()._load_best_model()
        self._load_renamed_weights(self.state.best_model_checkpoint)

    def _load_renamed_weights(self, folder: str) -> None:
        """
        Weights that transformers saves under other names than they have in the model, as experts are, one by one:
        Trainer looks for the model's names alone, and would leave these as they are without a word.
        """
        model = self.accelerator.unwrap_model(self.model)
        if self.is_deepspeed_enabled or isinstance(model, PeftModel):
            return
        saved = set()
        for path in Path(folder).glob("model*.safetensors"):
            with safe_open(path, "pt") as file:
                saved.update(file.keys())
        renamed = model.state_dict().keys() - saved - getattr(model, "all_tied_weights_keys", {}).keys()
        if renamed:
            weights = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
            model.load_state_dict({name: weights[name] for name in renamed}, strict=False)

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
            if tensors := self._extra_state():
                path = os.path.join(staged, EXTRA_STATE_NAME.format(self.accelerator.process_index))
                # Micro-batches are views of one tensor, which safetensors refuses
                save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
            if self.state.best_model_checkpoint == staged:
                self.state.best_model_checkpoint = checkpoint
            (save,) = broadcast_object_list([uuid.uuid4().hex])
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
                finish_checkpoint(staged, checkpoint, {**self._checkpoint_record(), "save": save})
        except Exception as error:
            raise RuntimeError(
                f"The checkpoint of step {self.state.global_step} could not be written to {run_dir} ({error}). Those "
                "before it are whole: resume from the last. If the disk is full, make room, or set `save_total_limit`."
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


def rollout_tensors(
    step: int, batches: Sequence[dict[str, torch.Tensor]], groups: Sequence[torch.Tensor] = ()
) -> dict[str, torch.Tensor]:
    """
    The rollout that is being learned from, as tensors of a checkpoint: it serves several steps.

    Args:
        step (`int`):
            Forward and backward passes so far, which say how much of the rollout has been used.
        batches (`Sequence[dict[str, torch.Tensor]]`):
            Micro-batches of the rollout.
        groups (`Sequence[torch.Tensor]`, *optional*):
            Whole groups that the contrastive loss compares with.
    """
    tensors = {"rollout.step": torch.tensor(step)}
    for i, batch in enumerate(batches):
        tensors.update({f"rollout.batch.{i}.{name}": tensor for name, tensor in batch.items()})
    return tensors | {f"rollout.group.{i}": tensor for i, tensor in enumerate(groups)}


def rollout_from_tensors(
    tensors: dict[str, torch.Tensor],
) -> tuple[int, list[dict[str, torch.Tensor]] | None, tuple[torch.Tensor, ...]]:
    """Step, micro-batches (`None` without any) and groups that [`rollout_tensors`] was given."""
    batches, groups = defaultdict(dict), {}
    for name, tensor in tensors.items():
        match name.split("."):
            case ["rollout", "batch", i, key]:
                batches[int(i)][key] = tensor
            case ["rollout", "group", i]:
                groups[int(i)] = tensor
    step = tensors["rollout.step"].item()
    return step, [batches[i] for i in sorted(batches)] or None, tuple(groups[i] for i in sorted(groups))


PREFIX = "optimizer."


def with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those of named tensors whose name begins so, by what follows."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


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
