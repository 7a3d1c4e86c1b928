# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Folders that are whole or not there, and what a checkpoint must be to be resumed from."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from ..models.fingerprint import fingerprints_match


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
