# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A policy and its main model, put together to answer."""

import functools
import itertools
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
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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
from ..models.architectures import base_model_of
from ..models.hub import (
    find_file,
    hub_arguments,
    leave_out_folders,
    name_or_model,
    readable_damage,
    readable_push_errors,
    renamed_card,
    short_card,
)
from ..models.latent_policy import LatentPolicyModel, LatentPolicyOutput
from ..models.loading import BASE_POLICY, load_main_model_of, load_policy, name_base_policy_beside, policy_below
from ..models.value_head import VALUE_HEAD_FILE, ValueHead
from ..rewards import majority_vote


SELECTIONS = ("first", "majority", "best")


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

    _find_file = staticmethod(lambda file: None)  # what lies where it was loaded from
    # What its latents can be compared with, see `evaluation.answer_questions`
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
                What decodes: `"transformers"`, `"vllm"` (in this process) or the URL of a vLLM server, or several
                with commas between them.
            max_new_tokens (`int`, *optional*):
                Tokens of an answer at most. If `None`, as many as the policy was trained with, or 256 if it names
                none.
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
        if vllm_kwargs and engine != "vllm":
            raise ValueError(f"`vllm_kwargs` are for `engine='vllm'`, got {engine!r}.")
        if batch_size is not None and engine == "vllm":
            raise ValueError("`batch_size` has no meaning for `engine='vllm'`, which makes its own batches.")
        load = {"token": token, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
        load |= main_model_init_kwargs or {}
        main_model, main_processing_class = load_main_model_of(config, main_model, main_processing_class, load)
        policy.attach_main_model(main_model, allow_mismatch=allow_main_model_mismatch)
        if max_new_tokens is None:
            max_new_tokens = config.max_completion_length or 256
        if engine == "transformers":
            if not (getattr(main_model, "is_quantized", False) or hasattr(main_model, "hf_device_map")):
                main_model.to(device)
            options = {"batch_size": batch_size}
        else:  # vLLM holds the weights; of these, only the embeddings are needed
            if not hasattr(main_model, "hf_device_map"):
                main_model.get_input_embeddings().to(device)
            hub_of_main = hub_arguments({"revision": getattr(main_model.config, "_commit_hash", None), **load})
            if engine == "vllm":
                options = {"llm_kwargs": {**vllm_hub_arguments(hub_of_main), **(vllm_kwargs or {})}}
            else:
                options = {} if batch_size is None else {"batch_size": batch_size}
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
        if find_file(name, "tokenizer_config.json", **hub) is None:
            raise ValueError(
                f"{name!r} has a policy, and no tokenizer of its assistant (`tokenizer_config.json`) beside it. Save it "
                "there: `tokenizer.save_pretrained`."
            )
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
        Save policy, tokenizer, value head and card, with its metrics and plots. The main model is named in the
        configuration, not saved.

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
        Upload policy, tokenizer, value head and card, with its metrics and plots. The card is the one that the policy
        was loaded with, which names this repository then, else the one that the repository has, else a short one.

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
                    card = renamed_card(card_path.read_text(encoding="utf-8"), repo_id)
                else:
                    try:
                        card = ModelCard.load(repo_id, token=token)
                    except EntryNotFoundError:
                        card = ModelCard(self._short_card(repo_id))
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
        num_latents: int | None = None,
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
            num_latents (`int`, *optional*):
                Latents of a trajectory at most, the first ones. If `None`, as many as the policy was trained with.

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
        self.check_num_latents(num_latents)
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            drawn = self._draw(prompts, num_samples, deterministic=not do_sample)
        if num_latents is not None:
            drawn.limit(torch.tensor(num_latents))
        shape = len(prompts), num_samples
        scores = None
        if self.value_head is not None:
            scores = self.score(drawn).unflatten(0, shape)
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
                f"`stream` needs `engine='transformers'`; {type(self.engine).__name__} returns whole answers. Use "
                "`generate`."
            )
        ids = self.tokenize_for_main_model([prompt])[0]
        latents, lengths = self.sample_latents([prompt], deterministic=not do_sample)
        latent_embeds = self.policy.inject(latents[:, : lengths[0]])
        return self.engine.stream(ids, latent_embeds, max_new_tokens, self.policy.config.anchor_ids)

    # ---- Its two halves ----

    def tokenize(self, prompts: list) -> dict[str, torch.Tensor]:
        """Left-padded `input_ids` and `attention_mask` of prompts in the assistant's tokens."""
        ids = tokenize_prompts(prompts, self.processing_class, self.policy.config.chat_template_kwargs)
        batch = self.processing_class.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        batch = batch.to(self.policy.device)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def check_num_latents(self, num_latents: int | None) -> None:
        """Raise a `ValueError` if trajectories cannot be of at most so many latents."""
        check_type("num_latents", num_latents, int | None)
        most = self.policy.config.num_latents
        if num_latents is not None and not 1 <= num_latents <= most:
            raise ValueError(f"`num_latents` must be between 1 and the policy's {most}, got {num_latents}.")

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

    def score(self, drawn: LatentPolicyOutput) -> torch.Tensor:
        """Log-odds of reward of trajectories by the value head, shape `(num_rows,)`."""
        return self.value_head(self.policy.features(drawn.latents, drawn.lengths), drawn.question_states)

    def decode(
        self,
        prompts: list,
        latents: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        num_anchors: int = 0,
    ) -> list[str]:
        """
        Text that the main model writes after each prompt and the latents for it (the first `lengths` of them, if not
        all), or after the prompt alone. Several trajectories per prompt stand next to each other in `latents`. Without
        latents, `num_anchors` plain tokens of the policy's anchor text may stand in their place.
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
            latent_embeds, anchor_ids = self.policy.inject(latents), self.policy.config.anchor_ids
            completion_ids = self.engine.generate(ids, latent_embeds, num_samples, lengths, anchor_ids)
        return self.engine.decode(completion_ids)
