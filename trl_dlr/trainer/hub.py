# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
What goes to the Hub from a trainer and when, what is said if it does not arrive, and the card of a trained policy.
"""

import json
import os
import re
import shutil
import tempfile
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path

from accelerate.logging import get_logger
from huggingface_hub import CommitInfo, EvalResult, HfApi
from transformers.trainer import HubStrategy
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import PushInProgress

from ..models import LatentPolicyConfig
from ..models.hub import (
    DEFAULT_PROMPT,
    card_data,
    describe_push_failure,
    hub_name,
    leave_out_folders,
    main_model_link,
    readable_push_errors,
    usage,
)
from ..report.page import PROBE_FILES, RESULTS_FILE, RUN_FILE
from .arguments import ReportableArguments, without_secrets
from .checkpoints import whole_files


logger = get_logger(__name__)


SNAPSHOTS = "_pushes"  # folder of what is being uploaded, in the run's


def take_snapshot(folder: str, parent: str) -> str:
    """
    A new folder in `parent` with the files of `folder` as they are now, without checkpoints, names that begin with
    `_` or `.`, TensorBoard's logs, and what shows questions and their answers: the report's pages, not its plots, and
    TRL's logged completions.
    Weights and states are hard links where the file system has them: they are replaced or deleted, never written to.
    """

    def keep(source: str, target: str) -> None:
        if source.endswith((".safetensors", ".pt")):
            try:
                return os.link(source, target)
            except OSError:
                pass
        shutil.copy(source, target)

    os.makedirs(parent, exist_ok=True)
    snapshot = tempfile.mkdtemp(dir=parent)
    pages = "report.html", RUN_FILE, *PROBE_FILES.values()
    others = "_*", ".*", f"{PREFIX_CHECKPOINT_DIR}-*", "completions_*.parquet", "*.tfevents.*"
    ignored = shutil.ignore_patterns(*others, *pages)
    shutil.copytree(folder, snapshot, ignore=ignored, copy_function=keep, dirs_exist_ok=True)
    leave_out_folders(snapshot)
    return snapshot


class PushesMixin:
    """
    For a TRL trainer with [`CheckpointsMixin`]: pushes of what was saved, without secrets and what shows questions. One
    that fails at the end raises, one that fails in the background is logged, both in words.
    """

    _saved_names = ()  # files that the model was last saved as

    def __init__(self, *args, **kwargs):
        self._hub = HfApi()  # one for all uploads, which it does one after the other
        super().__init__(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, **kwargs) -> None:
        """As [`~transformers.Trainer.init_hf_repo`]; `args.hub_revision` becomes a branch if it is none yet."""
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        if self.is_world_process_zero():  # what a killed run was uploading
            shutil.rmtree(os.path.join(self.args.output_dir, SNAPSHOTS), ignore_errors=True)
        with readable_push_errors(name):
            super().init_hf_repo(token=token, **kwargs)
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
        Save the model to `args.output_dir` and upload that folder, without checkpoints. Arguments are those of
        [`~transformers.Trainer.push_to_hub`].

        Raises:
            `RuntimeError`: if the upload failed, with the reason and what to do. What was saved is whole.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._complete_for_push()
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        with readable_push_errors(self.hub_model_id, self._what_is_left):
            if revision is not None:
                self._create_branch(revision, token)
            job = self._upload(self.args.output_dir, None, commit_message, token, revision)
            if blocking:
                return job.result()
        job.add_done_callback(self._warn_of_failed_push)
        return job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Upload a checkpoint's model in the background, and with `hub_strategy` the checkpoint. Failures are logged.
        """
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
        self._complete_for_push()
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(self.args.output_dir, None, message)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if is_last else os.path.basename(checkpoint_folder)
            jobs.append(self._upload(checkpoint_folder, name, f"{message}, checkpoint"))
        for job in jobs:
            job.add_done_callback(self._warn_of_failed_push)
        self.push_in_progress = PushInProgress(jobs)

    def _upload(
        self,
        folder: str,
        path_in_repo: str | None,
        commit_message: str,
        token: str | None = None,
        revision: str | None = None,
    ) -> Future:
        """Upload a folder as it is now, in the background, after what is being uploaded."""
        snapshot = take_snapshot(folder, os.path.join(self.args.output_dir, SNAPSHOTS))

        def upload() -> CommitInfo:
            try:
                return self._hub.upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=snapshot,
                    path_in_repo=path_in_repo,
                    commit_message=commit_message,
                    token=token if token is not None else self.args.hub_token,
                    revision=revision if revision is not None else self.args.hub_revision,
                )
            finally:
                shutil.rmtree(snapshot)

        return self._hub.run_as_future(upload)

    def _complete_for_push(self) -> None:
        """For what has to lie beside a model that is pushed."""

    @property
    def _what_is_left(self) -> str:
        return f"Its files are complete in {self.args.output_dir}."

    def _warn_of_failed_push(self, job: Future) -> None:
        if not job.cancelled() and job.exception() is not None:
            logger.warning(describe_push_failure(job.exception(), self.hub_model_id, self._what_is_left))


# Of the machine, the account or the run's surroundings rather than of the training
LEFT_OUT = re.compile(
    r"^(_.*|hub_.*|push_to_hub|output_dir|logging_dir|run_name|report_to|deepspeed|fsdp.*|local_rank|disable_tqdm"
    r"|use_cpu|.*_token|.*(host|port|url)|project|trackio.*|log_.*|logging_.*|save_.*|dataloader_.*|accelerator_config"
    r"|parallelism_config|resume_from_checkpoint|ddp_.*|gradient_checkpointing|activation_checkpointing)$"
)
LOCAL_PATH = re.compile(r"(^|[\s'\"=(\[])(~|/|[A-Za-z]:\\|\.\.?/)")
PACKAGES = ("trl_dlr", "trl", "transformers", "torch", "datasets", "tokenizers", "peft")
TRL_CITATION = """\
@software{vonwerra2020trl,
    title   = {{TRL: Transformers Reinforcement Learning}},
    author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
    license = {Apache-2.0},
    url     = {https://github.com/huggingface/trl},
    year    = {2020}
}"""


def training_card(
    repo_id: str,
    config: LatentPolicyConfig,
    args: ReportableArguments,
    method: str,
    paper: dict[str, str],
    tags: list[str],
    is_adapter: bool = False,
    dataset_name: str | None = None,
    prompt: str | list[dict[str, str]] = DEFAULT_PROMPT,
) -> str:
    """
    Card of a trained policy. Metrics and plots are those of `args.output_dir`: `eval_results.json` and `report/*.png`.

    Args:
        repo_id (`str`):
            Repository that the card is for.
        config ([`LatentPolicyConfig`]):
            Configuration of the policy.
        args ([`ReportableArguments`]):
            Configuration of the training.
        method (`str`):
            Name of the method.
        paper (`dict[str, str]`):
            Its `"title"`, arXiv `"id"` and `"citation"`.
        tags (`list[str]`):
            Further tags.
        is_adapter (`bool`, *optional*, defaults to `False`):
            Whether the policy was trained as an adapter.
        dataset_name (`str`, *optional*):
            Dataset that it was trained on.
        prompt (`str` or `list[dict[str, str]]`, *optional*):
            Question of the usage snippet.
    """
    name = repo_id.split("/")[-1]
    dataset = hub_name(dataset_name) if "/" in (dataset_name or "") else None
    results = read_results(args.output_dir)
    eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset or "held-out",
            dataset_name=dataset or "held-out questions",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in results.get("policy", {}).items()
    ]
    further = {"eval_results": eval_results, "model_name": name} if eval_results else {}
    data = card_data(config, is_adapter, ["generated_from_trainer", *tags], datasets=dataset, **further)
    made_from = hub_name(config.name_or_path) or hub_name(config.assistant_config.name_or_path)
    assistant = f"[{made_from}](https://huggingface.co/{made_from})" if made_from else "a local model"
    on = "" if dataset_name is None or LOCAL_PATH.search(dataset_name) else f" on `{without_secrets(dataset_name)}`"
    sections = [
        f"---\n{data}\n---",
        f"# {name}",
        f"A latent policy that was trained with {method}, the method of [{paper['title']}]"
        f"(https://huggingface.co/papers/{paper['id']}){on}. Its assistant comes from {assistant} and writes "
        f"{config.latents_in_words} per question; the frozen main model, {main_model_link(config)}, reads them "
        "after the question and writes the answer. The repository holds the policy, not the main model.",
        f"## Usage\n\n{usage(repo_id, config, prompt)}",
    ]
    if results:
        sections.append(f"## Results\n\nOn held-out questions.\n\n{results_table(results)}")
    if plots := sorted(path.name for path in Path(args.output_dir, "report").glob("*.png")):
        sections.append("\n\n".join(f"![{Path(plot).stem}](report/{plot})" for plot in plots))
    rows = "\n".join(f"| `{field}` | `{value}` |" for field, value in chosen_arguments(args).items())
    versions = "\n".join(f"- {package}: {version(package)}" for package in PACKAGES if is_adapter or package != "peft")
    sections += [
        f"## Training\n\nFields of `{type(args).__name__}` that were set:\n\n| | |\n|---|---|\n{rows}",
        f"### Framework versions\n\n{versions}",
        f"## Citation\n\n```bibtex\n{paper['citation'].strip()}\n```\n\n```bibtex\n{TRL_CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def read_results(output_dir: str) -> dict[str, dict[str, float]]:
    """Metrics `"<of what>/<metric>"` of `eval_results.json`, by of what; none if the file is not there."""
    path = os.path.join(output_dir, RESULTS_FILE)
    results: dict[str, dict[str, float]] = {}
    if os.path.exists(path):
        with open(path) as file:
            for key, value in json.load(file).items():
                of, _, metric = key.rpartition("/")
                if of and isinstance(value, (int, float)):
                    results.setdefault(of, {})[metric] = value
    return results


def results_table(results: dict[str, dict[str, float]]) -> str:
    columns = list(dict.fromkeys(metric for metrics in results.values() for metric in metrics))
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for of, metrics in results.items():
        cells = (f"{metrics[column]:.3f}" if column in metrics else "" for column in columns)
        lines.append(f"| {of.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def chosen_arguments(args: ReportableArguments) -> dict[str, str]:
    """Fields that were set, without those that say where and for whom it ran."""
    chosen = {}
    for name, value in args.set_values().items():
        if value in (None, {}, []) or LEFT_OUT.match(name) or LOCAL_PATH.search(str(value)):
            continue
        chosen[name] = str(value).replace("|", "\\|").replace("\n", "\\n")
    return chosen
