# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A policy and its main model, put together to answer."""

import copy
import functools
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..field_types import check_type
from ..generation import (
    DecodingEngine,
    TransformersEngine,
    check_engine_name,
    create_engine,
    tokenize_prompts,
)
from ..generation.text import check_tokenizers
from ..generation.vllm_engine import vllm_hub_arguments
from ..models.hub import (
    check_dtype,
    find_file,
    hub_arguments,
    leave_out_folders,
    name_or_model,
    readable_damage,
    readable_push_errors,
    short_card,
)
from ..models.latent_policy import LatentPolicyModel, LatentPolicyOutput
from ..models.latent_policy_config import LatentPolicyConfig
from ..models.main_model import base_model_of
from ..models.thinking import THINKING_FILE
from ..models.value_head import VALUE_HEAD_FILE, ValueHead
from ..rewards import majority_vote


SELECTIONS = ("first", "majority", "best")
BASE_POLICY = "base_policy"  # folder beside an adapter whose base policy is saved nowhere else


@dataclass
class LatentReasonerOutput:
    """
    Answers of a [`LatentReasoner`].

    Args:
        texts (`list[str]`):
            The answer to each prompt.
        candidates (`list[list[str]]`):
            All `num_samples` completions of each prompt.
        latents (`torch.Tensor` of shape `(num_prompts, num_samples, T, latent_dim)`):
            The latents that they were decoded from, 0 after a trajectory's last step.
        lengths (`torch.Tensor` of shape `(num_prompts, num_samples)`):
            Latent steps of each trajectory.
        scores (`torch.Tensor` of shape `(num_prompts, num_samples)`, *optional*):
            Log-odds of reward by the value head, if the policy was trained with one.
    """

    texts: list[str]
    candidates: list[list[str]]
    latents: torch.Tensor
    lengths: torch.Tensor
    scores: torch.Tensor | None = None


class LatentReasoner:
    """
    Answers prompts with a latent policy and a frozen main model.

    Example:

    ```python
    >>> from trl_dlr import LatentReasoner

    >>> reasoner = LatentReasoner.from_pretrained("user/policy")
    >>> reasoner.generate(["What is 3 + 4?"]).texts
    ```

    Args:
        policy ([`LatentPolicyModel`] or [`~peft.PeftModel`]):
            Policy that draws the latents, or an adapter of one.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of its assistant.
        engine ([`DecodingEngine`]):
            Main model that decodes.
        main_processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the main model.
        value_head ([`ValueHead`], *optional*):
            What a trajectory is worth before it is decoded, for `selection="best"`.
        model_card (`str`, *optional*):
            Card that is saved and pushed with the policy. If `None`, a short one is written.
    """

    # What its latents can be compared with, see `evaluation.answer_questions`
    _find_file = staticmethod(lambda file: None)  # what lies where it was loaded from

    controls = ("policy", "mean_latents", "no_latents", "plain_anchors", "zero_latents", "fresh_head", "shuffled")

    def __init__(
        self,
        policy: LatentPolicyModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        engine: DecodingEngine | None,
        main_processing_class: PreTrainedTokenizerBase | None,
        value_head: ValueHead | None = None,
        model_card: str | None = None,
    ):
        self.model = policy
        self.policy = base_model_of(policy)
        self.processing_class = processing_class
        self.engine = engine
        self.main_processing_class = main_processing_class
        self.value_head = value_head
        self.model_card = model_card

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        main_model: str | PreTrainedModel | None = None,
        main_processing_class: PreTrainedTokenizerBase | None = None,
        *,
        engine: str = "transformers",
        max_new_tokens: int | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
        main_model_init_kwargs: dict[str, Any] | None = None,
        vllm_kwargs: dict[str, Any] | None = None,
        allow_main_model_mismatch: bool = False,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
    ) -> "LatentReasoner":
        """
        Load a policy (or an adapter of one), and the main model that it was trained for.

        Args:
            pretrained_model_name_or_path (`str`):
                Hub id or folder of a policy.
            main_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
                Main model. If `None`, the one named in the policy's configuration, at the revision named there. Its
                weights are checked against the fingerprint recorded there.
            main_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                Its tokenizer. If `None`, the one saved with it.
            engine (`str`, *optional*, defaults to `"transformers"`):
                What decodes: `"transformers"`, `"vllm"` (in this process) or the URL of a vLLM server.
            max_new_tokens (`int`, *optional*):
                Tokens of an answer at most. If `None`, as many as the policy was trained with, or 256 if it names none.
            generation_kwargs (`dict`, *optional*):
                Further fields of [`~transformers.GenerationConfig`], or of `vllm.SamplingParams`. Decoding is greedy
                unless they say otherwise.
            batch_size (`int`, *optional*):
                Trajectories that transformers decodes together at most. If `None`, all.
            main_model_init_kwargs (`dict`, *optional*):
                Keyword arguments for loading the main model, such as `dtype`, `quantization_config` or `device_map`.
                If `dtype` is not given, the one that the policy was trained with is used.
            vllm_kwargs (`dict`, *optional*):
                Further arguments of `vllm.LLM`.
            allow_main_model_mismatch (`bool`, *optional*, defaults to `False`):
                Whether to go on, with a warning, with a main model of other weights.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether code that comes with the main model may be executed. A policy brings none.
            device (`str` or `torch.device`, *optional*):
                Where policy and main model go. If `None`, a GPU if there is one.
            revision (`str`, *optional*):
                Branch, tag or commit of the policy.
            token (`str` or `bool`, *optional*):
                Token for private repositories.
            cache_dir (`str`, *optional*):
                Where downloads are kept.

        Raises:
            `ValueError`: the folder holds no policy, no main model is known, or its weights are others.
        """
        name = pretrained_model_name_or_path
        check_engine_name(engine)
        check_tokenizers(main_processing_class=main_processing_class)
        main_model = None if main_model is None else name_or_model(main_model, "main_model")
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        reasoner = cls.without_main_model(name, **hub)
        policy, config = reasoner.policy, reasoner.policy.config
        for module in filter(None, (reasoner.model, reasoner.value_head)):
            module.to(device)
        if isinstance(main_model, PreTrainedModel) and main_model_init_kwargs:
            raise ValueError("`main_model_init_kwargs` are for a `main_model` given by name, not for a loaded one.")
        load = {"token": token, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
        load |= main_model_init_kwargs or {}
        main_model, main_processing_class = load_main_model(config, main_model, main_processing_class, load)
        policy.attach_main_model(main_model, allow_mismatch=allow_main_model_mismatch)
        if max_new_tokens is None:
            max_new_tokens = config.max_completion_length or 256
        if engine == "transformers":
            if not (getattr(main_model, "is_quantized", False) or hasattr(main_model, "hf_device_map")):
                main_model.to(device)
            options = {"batch_size": batch_size}
        else:  # vLLM holds the weights; of these, only the embeddings are needed
            main_model.get_input_embeddings().to(device)
            hub_of_main = hub_arguments({"revision": getattr(main_model.config, "_commit_hash", None), **load})
            options = {"llm_kwargs": {**vllm_hub_arguments(hub_of_main), **(vllm_kwargs or {})}}
            options = options if engine == "vllm" else {}
        reasoner.engine = create_engine(
            engine, main_model, main_processing_class, max_new_tokens, generation_kwargs, **options
        )
        reasoner.main_processing_class = main_processing_class
        return reasoner

    @classmethod
    def without_main_model(
        cls,
        pretrained_model_name_or_path: str,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
    ) -> "LatentReasoner":
        """A policy on the CPU with what was saved beside it. It can be pushed, but answers nothing."""
        name, hub = pretrained_model_name_or_path, {"revision": revision, "token": token, "cache_dir": cache_dir}
        model = load_policy(name, **hub).eval()
        config = base_model_of(model).config
        with readable_damage(name):
            processing_class = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False, **hub)
        value_head = None
        if (path := find_file(name, VALUE_HEAD_FILE, **hub)) is not None:  # not there if it was trained without one
            value_head = ValueHead(config.num_latents * config.feature_size, config.hidden_size)
            with readable_damage(name):
                value_head.load_state_dict(load_file(path))
        card_path = find_file(name, "README.md", **hub)
        model_card = None if card_path is None else Path(card_path).read_text(encoding="utf-8")
        reasoner = cls(model, processing_class, None, None, value_head, model_card)
        reasoner._find_file = functools.partial(find_file, name, **hub)
        return reasoner

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """
        Save policy, tokenizer, value head and card, with its metrics and plots. The main model is named in the configuration, not saved.

        Args:
            save_directory (`str`):
                Folder. An adapter has its base policy in a folder of it.
            **kwargs:
                As for [`~transformers.PreTrainedModel.save_pretrained`].
        """
        self.model.save_pretrained(save_directory, **kwargs)
        if isinstance(self.model, PeftModel):
            policy_below(self.model).save_pretrained(os.path.join(save_directory, BASE_POLICY), **kwargs)
            name_base_policy_beside(save_directory)
            self.policy.config.save_pretrained(save_directory)  # for what reads a model by its configuration
        self.processing_class.save_pretrained(save_directory)
        if self.value_head is not None:
            save_file(self.value_head.state_dict(), os.path.join(save_directory, VALUE_HEAD_FILE))
        card = self.model_card or self._short_card(Path(save_directory).absolute().name)
        for file in ("eval_results.json", *re.findall(r"\]\((report/[\w.-]+\.png)\)", card)):
            path, target = self._find_file(file), Path(save_directory, file)
            if path is None:
                card = re.sub(rf"!\[[^\]]*\]\({re.escape(file)}\)\n*", "", card)
            elif not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copy(path, target)
        Path(save_directory, "README.md").write_text(card, encoding="utf-8")

    def _short_card(self, repo_id: str, tags: list[str] | None = None) -> str:
        return short_card(repo_id, self.policy.config, isinstance(self.model, PeftModel), tags or [])

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload policy",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """
        Upload policy, tokenizer, value head and card, with its metrics and plots. The card is the one that the policy was
        loaded with, whose usage names this repository then, else the one that the repository has, else a short one.

        Args:
            repo_id (`str`):
                Repository, which is made if it is not there.
            commit_message (`str`, *optional*, defaults to `"Upload policy"`):
                Message of the commit.
            private (`bool`, *optional*):
                Whether a new repository is private. If `None`, what the account has set.
            token (`str` or `bool`, *optional*):
                Token with write access.
            revision (`str`, *optional*):
                Branch, which is made if it is not there.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to open a pull request instead of committing.
            tags (`list[str]`, *optional*):
                Further tags of the card.

        Returns:
            [`~huggingface_hub.CommitInfo`]

        Raises:
            `RuntimeError`: if it failed, with the reason and what to do.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            leave_out_folders(folder)
            with readable_push_errors(repo_id):
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if revision is not None:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                if isinstance(self.model, PeftModel):
                    name_base_policy_beside(folder, repo_id)
                card_path = Path(folder, "README.md")
                if self.model_card is not None:
                    card = card_path.read_text(encoding="utf-8")
                    card = re.sub(r'(?<=Reasoner\.from_pretrained\()"[^"]*"', f'"{repo_id}"', card)
                else:
                    try:
                        card = ModelCard.load(repo_id, token=token).content
                    except EntryNotFoundError:
                        card = self._short_card(repo_id)
                card = ModelCard(card)
                card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *(tags or [])]))
                card.save(card_path)
                return api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=revision,
                    create_pr=create_pr,
                )

    # ---- Answers ----

    @torch.no_grad()
    def generate(
        self,
        prompts: list,
        num_samples: int = 1,
        do_sample: bool | None = None,
        selection: str = "first",
        seed: int | None = None,
        max_new_tokens: int | None = None,
    ) -> LatentReasonerOutput:
        """
        Answer prompts.

        Args:
            prompts (`list[str]` or `list[list[dict[str, str]]]`):
                Prompts, plain or conversational.
            num_samples (`int`, *optional*, defaults to `1`):
                Trajectories per prompt.
            do_sample (`bool`, *optional*):
                Whether latents are sampled. If not, the mean of every step is taken, up to where a learned stop is
                likelier than not. If `None`, they are sampled when there is more than one.
            selection (`str`, *optional*, defaults to `"first"`):
                Which completion of a prompt is its answer: the `"first"`, one that gives the `"majority"` answer
                (self-consistency), or the `"best"` by the value head (best of n, which decodes only that one).
            seed (`int`, *optional*):
                Seed of the latents. If `None`, torch's global generator goes on.
            max_new_tokens (`int`, *optional*):
                Tokens of an answer at most. If `None`, as many as the reasoner was loaded with.

        Returns:
            [`LatentReasonerOutput`]
        """
        if isinstance(prompts, str) or not prompts or isinstance(prompts[0], dict):
            raise ValueError(f"`prompts` must be a list of prompts, at least one, got {prompts!r}. Put it in a list.")
        check_type("num_samples", num_samples, int)
        if num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
        if do_sample is None:
            do_sample = num_samples > 1
        if num_samples > 1 and not do_sample:
            raise ValueError(
                f"`do_sample=False` takes the mean of every step, so all `num_samples={num_samples}` would be alike. "
                "Use `num_samples=1`, or sample."
            )
        if selection not in SELECTIONS:
            raise ValueError(f"`selection` must be one of {', '.join(SELECTIONS)}, got {selection!r}.")
        if selection == "best" and self.value_head is None:
            raise ValueError(
                "`selection='best'` needs a value head, but the policy was trained without one "
                "(`prescreening_fraction=1`). Use 'majority'."
            )
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            drawn = self._draw(prompts, num_samples, deterministic=not do_sample)
        shape = len(prompts), num_samples
        scores = None
        if self.value_head is not None:
            scores = self.value_head(self.policy.features(drawn.latents, drawn.lengths), drawn.question_states)
            scores = scores.unflatten(0, shape)
        latents, lengths = drawn.latents.unflatten(0, shape), drawn.lengths.unflatten(0, shape)
        with self.engine.limited_to(max_new_tokens):
            if selection == "best":
                chosen = torch.arange(len(prompts)), scores.argmax(1)
                decoded = self.decode(prompts, latents[chosen], lengths[chosen])
            else:
                decoded = self.decode(prompts, drawn.latents, drawn.lengths)
        if selection == "best":
            candidates = [[text] for text in decoded]
        else:
            candidates = [decoded[start : start + num_samples] for start in range(0, len(decoded), num_samples)]
        indices = [majority_vote(texts) if selection == "majority" else 0 for texts in candidates]
        texts = [texts[index] for texts, index in zip(candidates, indices, strict=True)]
        return LatentReasonerOutput(texts, candidates, latents, lengths, scores)

    @torch.no_grad()
    def stream(
        self, prompt: str | list[dict[str, str]], do_sample: bool = False, max_new_tokens: int | None = None
    ) -> Iterator[str]:
        """
        Pieces of the answer to one prompt, as the main model writes it.

        Args:
            prompt (`str` or `list[dict[str, str]]`):
                Prompt, plain or conversational.
            do_sample (`bool`, *optional*, defaults to `False`):
                Whether latents are sampled. If not, the mean of every step is taken.
            max_new_tokens (`int`, *optional*):
                Tokens of the answer at most. If `None`, as many as the reasoner was loaded with.

        Raises:
            `ValueError`: if the main model is not decoded by transformers.
        """
        if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], dict)):
            raise ValueError(f"`prompt` must be one prompt, a text or a list of messages, got {prompt!r}.")
        if not isinstance(self.engine, TransformersEngine):
            raise ValueError(
                f"`stream` needs `engine='transformers'`; {type(self.engine).__name__} returns whole answers. Use `generate`."
            )
        ids = self.tokenize_for_main_model([prompt])[0]
        latents, lengths = self.sample_latents([prompt], deterministic=not do_sample)
        return self.engine.stream(ids, self.policy.inject(latents[:, : lengths[0]]), max_new_tokens)

    # ---- Its two halves ----

    def tokenize(self, prompts: list) -> dict[str, torch.Tensor]:
        """Left-padded `input_ids` and `attention_mask` of prompts in the assistant's tokens."""
        ids = tokenize_prompts(prompts, self.processing_class, self.policy.config.chat_template_kwargs)
        batch = self.processing_class.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        batch = batch.to(self.policy.device)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def tokenize_for_main_model(self, prompts: list) -> list[list[int]]:
        """Ids of prompts in the main model's tokens."""
        return tokenize_prompts(prompts, self.main_processing_class, self.policy.config.chat_template_kwargs)

    def _draw(self, prompts: list, num_samples: int, deterministic: bool) -> LatentPolicyOutput:
        return self.policy.sample(**self.tokenize(prompts), num_samples=num_samples, deterministic=deterministic)

    def sample_latents(
        self, prompts: list, num_samples: int = 1, deterministic: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Latents of `num_samples` trajectories per prompt, shape `(len(prompts) * num_samples, T, latent_dim)`, a
        prompt's next to each other, and the number of them that each trajectory has. `deterministic` takes the mean of
        every step, and stops where that is likelier than not.
        """
        drawn = self._draw(prompts, num_samples, deterministic)
        return drawn.latents, drawn.lengths

    def decode(
        self,
        prompts: list,
        latents: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        num_anchors: int = 0,
    ) -> list[str]:
        """
        Text that the main model writes after each prompt and the latents for it (the first `lengths` of them, if not all),
        or after the prompt alone. Several trajectories per prompt stand next to each other in `latents`. Without latents,
        `num_anchors` plain tokens of the policy's anchor text may stand in their place.
        """
        ids = self.tokenize_for_main_model(prompts)
        if latents is None:
            if num_anchors > 0:
                anchor_text = self.policy.config.anchor_text
                anchors = self.main_processing_class(anchor_text, add_special_tokens=False)["input_ids"]
                plain = list(itertools.islice(itertools.cycle(anchors), num_anchors))
                ids = [prompt + plain for prompt in ids]
            completion_ids = self.engine.generate(ids)
        else:
            num_samples = torch.full((len(prompts),), latents.size(0) // len(prompts))
            completion_ids = self.engine.generate(ids, self.policy.inject(latents), num_samples, lengths)
        return self.engine.decode(completion_ids)


def load_policy(
    pretrained_model_name_or_path: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    is_trainable: bool = False,
) -> LatentPolicyModel | PeftModel:
    """
    A saved policy in float32, or an adapter on the policy that it was trained on, which lies beside it or where the
    adapter's configuration says. `is_trainable` is PEFT's: whether the adapter is loaded to go on training it.
    """
    name, hub = pretrained_model_name_or_path, {"token": token, "cache_dir": cache_dir}
    here = {"revision": revision, **hub}
    kwargs = {"dtype": torch.float32, "use_safetensors": True}
    with readable_damage(name):
        if find_file(name, "adapter_config.json", **here) is None:
            found = _model_type(name, **here)
            if found != LatentPolicyConfig.model_type:
                hint = (
                    f" Nor does it think by itself (it has no `{THINKING_FILE}`): a Coconut model does from its first stage "
                    "with latents on, and is an ordinary one before."
                )
                if find_file(name, THINKING_FILE, **here) is not None:
                    hint = " It is a model that thinks by itself: load it with `ThinkingReasoner`."
                raise ValueError(
                    f"{name!r} holds neither a policy (a `config.json` of type {LatentPolicyConfig.model_type!r}, found "
                    f"{found!r}) nor an adapter of one (`adapter_config.json`).{hint}"
                )
            return LatentPolicyModel.from_pretrained(name, **kwargs, **here)
        if find_file(name, f"{BASE_POLICY}/config.json", **here) is not None:
            # In a local folder, transformers below 5.23 would take the adapter for what `subfolder` holds
            base_name, subfolder = (
                (os.path.join(name, BASE_POLICY), "") if Path(name).is_dir() else (name, BASE_POLICY)
            )
            base = LatentPolicyModel.from_pretrained(base_name, subfolder=subfolder, **kwargs, **here)
        else:
            config = PeftConfig.from_pretrained(name, **here)
            if config.base_model_name_or_path is None:
                raise ValueError(
                    f"{name!r} is an adapter that names no base model (`base_model_name_or_path` in its "
                    "`adapter_config.json`): it was built in memory. Save that policy, and set the name to its folder."
                )
            there = {"revision": config.revision, **hub}
            found = _model_type(config.base_model_name_or_path, **there)
            if found != LatentPolicyConfig.model_type:
                raise ValueError(
                    f"{name!r} is an adapter of {config.base_model_name_or_path!r}, a model of type {found!r}, and not of a "
                    "latent policy: another trainer, such as TRL's `GRPOTrainer`, has trained it. Load it with PEFT's "
                    "`AutoPeftModelForCausalLM`, or if it thinks by itself with `ThinkingReasoner`."
                )
            base = LatentPolicyModel.from_pretrained(config.base_model_name_or_path, **kwargs, **there)
        return PeftModel.from_pretrained(base, name, is_trainable=is_trainable, **here)


def _model_type(name: str, **hub) -> str | None:
    """What the configuration of a folder or repository says that it is."""
    path = find_file(name, "config.json", **hub)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")


def load_main_model(
    config: LatentPolicyConfig,
    main_model: str | PreTrainedModel | None = None,
    main_processing_class: PreTrainedTokenizerBase | None = None,
    init_kwargs: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The main model of a policy, frozen, and its tokenizer.

    Args:
        config ([`LatentPolicyConfig`]):
            Configuration of the policy, which names main model, revision and dtype.
        main_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Main model, or another place for it.
        main_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. If `None`, the one saved with it.
        init_kwargs (`dict`, *optional*):
            Keyword arguments for loading both.

    Raises:
        `ValueError`: no main model is known, or it is not where it should be.
    """
    init_kwargs = dict(init_kwargs or {})
    if main_model is None:
        main_model = config.main_model_name_or_path
        if main_model is None:
            raise ValueError(
                f"`main_model` must be given: the policy {config.name_or_path!r} was trained for one that was built in memory "
                "or, if it is from the Hub, lies in a folder of another machine."
            )
        init_kwargs = {"revision": config.main_model_revision, **init_kwargs}
    hub = hub_arguments(init_kwargs)
    if isinstance(main_model, str):
        where = {name: hub.get(name) for name in ("revision", "token", "cache_dir")}
        try:
            find_file(main_model, "config.json", **where)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"The policy's main model cannot be loaded: {error} Say where it is with `main_model` (on the command line, "
                "`--main_model_name_or_path`)."
            ) from error
        kwargs = {"dtype": config.main_model_dtype or "auto", **init_kwargs}
        check_dtype("main_model_init_kwargs['dtype']", kwargs["dtype"])
        with readable_damage(main_model):
            main_model = AutoModelForCausalLM.from_pretrained(main_model, **kwargs)
        main_model.config._commit_hash = hub.get("revision")  # which transformers no longer notes down
    if main_processing_class is None:
        name = main_model.config.name_or_path
        if not name:
            raise ValueError(
                "`main_processing_class` must be given: `main_model` was built in memory and names no tokenizer."
            )
        with readable_damage(name):
            main_processing_class = AutoTokenizer.from_pretrained(name, padding_side="left", **hub)
    return main_model.requires_grad_(False).eval(), main_processing_class


def policy_below(model: PeftModel) -> LatentPolicyModel:
    """A copy of the policy that an adapter was put on, as it was."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):  # `unload` would keep what was trained
            for name in module.modules_to_save:
                module.modules_to_save[name] = module.original_module
    return model.unload()


def name_base_policy_beside(folder: str, repo_id: str = BASE_POLICY) -> None:
    """
    Have a saved adapter name the base policy in its folder, not where on this machine it came from. On the Hub that is
    its own repository, which has the policy's configuration.
    """
    path = Path(folder, "adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": repo_id}, indent=2))
