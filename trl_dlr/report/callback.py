# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The page of a run, kept up to date while it trains."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig

from ..rewards import correctness_reward
from .page import PROBE_FILES, REPORT_DIR, RUN_FILE, write_report, write_whole
from .plots import check_matplotlib
from .probe import take_probe


logger = get_logger(__name__)


class LatentReportCallback(TrainerCallback):
    r"""
    A [`~transformers.TrainerCallback`] that writes `<output_dir>/report/report.html`: one page with the plots of a
    run, what its latents say, and completions before and after training, which opens without a network.

    It works in the main process alone and takes nothing from training's random numbers: weights are bit for bit those
    of a run without it.

    Usage:

    ```python
    >>> from trl_dlr import LatentGRPOTrainer, LatentReportCallback

    >>> trainer = LatentGRPOTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     main_model="Qwen/Qwen2.5-7B-Instruct",
    ...     reward_funcs=correctness_reward,
    ...     train_dataset=dataset,
    ... )
    >>> trainer.add_callback(LatentReportCallback(trainer, questions=dataset))
    >>> trainer.train()
    ```

    Args:
        trainer ([`LatentGRPOTrainer`] or another trainer of this package):
            Trainer to which the callback will be attached.
        questions ([`~datasets.Dataset`]):
            Questions with a column `"prompt"` and the columns that the reward reads. Their first `num_questions` are
            answered before and after training.
        reward_func (`Callable`, *optional*, defaults to [`~rewards.correctness_reward`]):
            Reward of a completion.
        num_questions (`int`, *optional*, defaults to `6`):
            Number of questions to answer.
        num_samples (`int`, *optional*, defaults to `16`):
            Trajectories sampled for each.
        report_steps (`int`, *optional*, defaults to `10`):
            Logs after which the page is written anew.
        probe_during_training (`bool`, *optional*, defaults to `False`):
            Whether questions are answered anew for each of these pages too, which costs decoding.

    Raises:
        `ImportError`: if matplotlib is missing.
        `ValueError`: if an argument does not fit.
    """

    def __init__(
        self,
        trainer: Trainer,
        questions: Dataset,
        reward_func: Callable[..., list[float]] = correctness_reward,
        num_questions: int = 6,
        num_samples: int = 16,
        report_steps: int = 10,
        probe_during_training: bool = False,
    ):
        check_matplotlib()
        if not hasattr(trainer, "answering"):
            raise ValueError(f"`trainer` must be one of this package's trainers, got {type(trainer).__name__}.")
        if not isinstance(questions, Dataset) or "prompt" not in questions.column_names or len(questions) == 0:
            raise ValueError(f"`questions` must be a `Dataset` with rows and a column 'prompt', got {questions}.")
        for name, value, least in (
            ("num_questions", num_questions, 1),
            ("num_samples", num_samples, 2),
            ("report_steps", report_steps, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        self.trainer = trainer
        self.questions = questions.select(range(min(num_questions, len(questions))))
        self.reward_func = reward_func
        self.num_samples = num_samples
        self.report_steps = report_steps
        self.probe_during_training = probe_during_training
        self._is_training = False
        self._num_logs = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        self._is_training, self._num_logs = True, 0
        self._folder.mkdir(parents=True, exist_ok=True)
        if state.global_step == 0:  # a resumed run keeps the look that was taken before its first step
            (self._folder / PROBE_FILES["after"]).unlink(missing_ok=True)
            self._probe("before", state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero or not self._is_training:
            return
        self._num_logs += 1
        if self._num_logs % self.report_steps == 0:
            with self._harmless():
                if self.probe_during_training:
                    self._probe("after", state)
                self._write(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        with self._harmless():
            if not self.trainer._preemption.is_preempted:  # the time until SIGKILL is not for decoding
                self._probe("after", state)
            self._write(state)
        self._is_training = False  # what is evaluated from here on is no part of the run's course

    @property
    def _folder(self) -> Path:
        return Path(self.trainer.args.output_dir) / REPORT_DIR

    def _keep(self, file: str, content: dict[str, Any]) -> None:
        write_whole(self._folder / file, json.dumps(content, ensure_ascii=False).encode())

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """A page that cannot be written is no reason to lose what was trained."""
        try:
            yield
        except Exception:
            logger.exception("The report could not be written. Training goes on without it.")

    def _probe(self, name: str, state: TrainerState) -> None:
        with self.trainer.answering() as reasoner:
            found = take_probe(
                reasoner, self.questions, self.reward_func, num_samples=self.num_samples, seed=self.trainer.args.seed
            )
        self._keep(PROBE_FILES[name], {"step": state.global_step, **found})

    def _write(self, state: TrainerState) -> None:
        trainer, args = self.trainer, self.trainer.args
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        run_summary = {
            "Trainer": type(trainer).__name__,
            **trainer.run_summary,
            "Trained parameters": f"{trained:,}",
            "Step": f"{state.global_step} of {state.max_steps}",
            "Processes": args.world_size,
            "Seed": args.seed,
        }
        run = {
            "log_history": state.log_history,
            "run_summary": run_summary,
            "title": os.path.basename(os.path.abspath(args.output_dir)),
        }
        if isinstance(args, GRPOConfig):
            passes = args.steps_per_generation * args.num_iterations
            run["steps_per_rollout"] = passes / args.gradient_accumulation_steps
        self._keep(RUN_FILE, run)
        write_report(args.output_dir, with_eval_results=False)
