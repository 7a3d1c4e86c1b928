# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Runs that go wrong: each in a process of its own, which test_faults.py starts and watches."""

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.launch import context
from tests.trainer.test_latent_grpo_trainer import make_trainer


SETTINGS = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,  # a rollout serves 4 steps: checkpoints stand in the middle of one and at its end
    "num_iterations": 4,
    "num_generations": 8,
    "prescreening_fraction": 0.5,
    "prescreening_warmup_rollouts": 1,
    "policy_kwargs": {"learn_sigma": True},
}


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(trainer, step: int, place: int, log: Path) -> None:
    """SIGKILL at the `place`-th time that saving `step` opens, makes, renames or removes a file or folder."""
    events = []

    def hook(event, args):
        is_of_save = trainer._staging_dir is not None and trainer.state.global_step == step
        if is_of_save and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            if isinstance(args[0], str) and "/run" in args[0]:
                events.append(event)
                os.write(descriptor, f"{event} {Path(args[0]).name}\n".encode())
                if len(events) == place:
                    die()

    descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    sys.addaudithook(hook)


def kill_in_step(trainer, step: int, place: str) -> None:
    """SIGKILL while `step` is in `place`, a method of the trainer or `"optimizer"`."""
    owner, name = (trainer.create_optimizer(), "step") if place == "optimizer" else (trainer, place)
    method = getattr(owner, name)

    def wrapped(*args, **kwargs):
        result = method(*args, **kwargs)
        if trainer.state.global_step == step:
            die()
        return result

    setattr(owner, name, wrapped)


def signal_in_step(trainer, step: int, number: int) -> None:
    """A signal from outside, while `step` decodes or learns."""
    training_step = trainer.training_step

    def wrapped(*args, **kwargs):
        if trainer.state.global_step == step:
            os.kill(os.getpid(), number)
        return training_step(*args, **kwargs)

    trainer.training_step = wrapped


def fill_disk(trainer, step: int, size: int) -> None:
    """No file can grow beyond `size` bytes while `step` is saved: writes fail, as on a full disk."""
    save_checkpoint = trainer._save_checkpoint

    def wrapped(*args, **kwargs):
        if trainer.state.global_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            save_checkpoint(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    trainer._save_checkpoint = wrapped


def run(folder: str, resume=None, fault=None, fault_args=(), **kwargs) -> None:
    """Train, save the final weights as `weights.safetensors`, losses and value head with them."""
    torch.set_num_threads(1)
    errors = os.open(Path(folder) / "stderr.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    trainer = make_trainer(Path(folder), **{**SETTINGS, **kwargs})
    if fault is not None:
        globals()[fault](trainer, *fault_args)
    trainer.train(resume_from_checkpoint=resume)
    tensors = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    tensors |= {f"value_head.{name}": tensor for name, tensor in trainer.prescreener.head.state_dict().items()}
    tensors["losses"] = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    save_file(tensors, Path(folder) / "weights.safetensors")


def start(folder: Path, **kwargs) -> multiprocessing.Process:
    folder.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=run, args=(str(folder),), kwargs=kwargs)
    process.start()
    return process


def finish(process: multiprocessing.Process, timeout: float = 120) -> int:
    """Exit status, negative for a signal."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"still running after {timeout} s")
    return process.exitcode
