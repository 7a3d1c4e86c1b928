# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Arguments of the commands that use a saved policy, and the reasoner that they stand for."""

import os
from dataclasses import dataclass
from typing import Any

from ..models.hub import check_dtype, find_file
from ..models.thinking import THINKING_FILE
from ..option_docs import described
from ..reasoners.latent_reasoner import LatentReasoner
from ..reasoners.thinking_reasoner import ThinkingReasoner


@described
@dataclass
class ReasonerArguments:
    """
    A saved policy and what decodes for it.

    Args:
        policy (`str`, *optional*):
            Hub id or folder of the policy, or of a model that thinks by itself.
        policy_revision (`str`, *optional*):
            Branch, tag or commit of the policy.
        main_model_name_or_path (`str`, *optional*):
            Main model. If `None`, the one that the policy was trained for.
        main_model_dtype (`str`, *optional*):
            Precision of its weights. If `None`, the one that the policy was trained with.
        engine (`str`, *optional*, defaults to `"transformers"`):
            What decodes: `transformers`, `vllm` or the URL of a vLLM server, or several with commas between them.
        max_new_tokens (`int`, *optional*):
            Tokens of an answer at most. If `None`, as many as the policy was trained with.
        device (`str`, *optional*):
            Where the models go. If `None`, a GPU if there is one.
        allow_main_model_mismatch (`bool`, *optional*, defaults to `False`):
            Whether to go on with a main model of other weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the main model may be executed.
    """

    policy: str | None = None
    policy_revision: str | None = None
    main_model_name_or_path: str | None = None
    main_model_dtype: str | None = None
    engine: str = "transformers"
    max_new_tokens: int | None = None
    device: str | None = None
    allow_main_model_mismatch: bool = False
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.policy is None:
            raise ValueError("`policy` must be set: pass --policy with a Hub id or a folder.")
        check_dtype("main_model_dtype", self.main_model_dtype)
        if (file := getattr(self, "output_json", None)) is not None:  # before there is anything to be lost
            folder = os.path.dirname(file) or "."
            if os.path.isdir(file) or not os.access(file if os.path.exists(file) else folder, os.W_OK):
                raise ValueError(
                    f"`output_json={file}` must be a file that can be written, in a folder that is there."
                )

    def load(self) -> LatentReasoner:
        if find_file(self.policy, THINKING_FILE, self.policy_revision) is not None:
            return self._load_thinking()
        kwargs: dict[str, Any] = {} if self.main_model_dtype is None else {"dtype": self.main_model_dtype}
        return LatentReasoner.from_pretrained(
            self.policy,
            self.main_model_name_or_path,
            engine=self.engine,
            max_new_tokens=self.max_new_tokens,
            main_model_init_kwargs=kwargs,
            allow_main_model_mismatch=self.allow_main_model_mismatch,
            trust_remote_code=self.trust_remote_code,
            device=self.device,
            revision=self.policy_revision,
        )

    def _load_thinking(self) -> ThinkingReasoner:
        """A model that thinks by itself, which has no main model and no other engine."""
        for name in ("main_model_name_or_path", "engine", "allow_main_model_mismatch"):
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"`{name}` has no meaning for {self.policy!r}: it thinks by itself. Leave it out.")
        return ThinkingReasoner.from_pretrained(
            self.policy,
            max_new_tokens=self.max_new_tokens,
            model_init_kwargs={} if self.main_model_dtype is None else {"dtype": self.main_model_dtype},
            trust_remote_code=self.trust_remote_code,
            device=self.device,
            revision=self.policy_revision,
        )

    def prompt(self, question: str, is_chat: bool, system_prompt: str | None) -> str | list[dict[str, str]]:
        """A question as a prompt: a chat message, or the text itself."""
        if not is_chat:
            return question
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return [*system, {"role": "user", "content": question}]
