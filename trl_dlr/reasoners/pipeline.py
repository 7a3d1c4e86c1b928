# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A policy and its main model as a transformers pipeline."""

from peft import PeftModel
from transformers import Pipeline, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY

from ..models.latent_policy import LatentPolicyModel
from .latent_reasoner import LatentReasoner, load_policy


class PolicyOrAdapter:
    """What [`~transformers.pipeline`] loads a policy by, which may be an adapter of one."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        **kwargs,
    ) -> LatentPolicyModel | PeftModel:
        """As [`load_policy`]. `kwargs`, which are of any model, have no part in it: a policy is in float32."""
        policy = load_policy(pretrained_model_name_or_path, revision, token, cache_dir)
        # Of an adapter itself, where it names the policy below it
        policy.config.name_or_path, policy.config._commit_hash = pretrained_model_name_or_path, revision
        return policy


class LatentReasoningPipeline(Pipeline):
    """
    Pipeline `"latent-reasoning"`, a [`LatentReasoner`] behind the interface of [`~transformers.pipeline`]. It takes what
    `"text-generation"` takes, a prompt or a chat or a list of them, and returns the answers alone. Keyword arguments of a
    call are those of [`LatentReasoner.generate`], and `batch_size`: prompts that are answered together.

    Example:

    ```python
    >>> import trl_dlr.reasoners.pipeline  # registers the task
    >>> from transformers import pipeline

    >>> pipe = pipeline("latent-reasoning", model="user/policy")
    >>> pipe("What is 3 + 4?", num_samples=8, selection="majority", max_new_tokens=64)
    [{'generated_text': ...}]
    >>> pipe(["What is 3 + 4?", "What is 5 + 6?"], batch_size=2)
    [[{'generated_text': ...}], [{'generated_text': ...}]]
    ```

    Args:
        model ([`LatentPolicyModel`] or [`~peft.PeftModel`]):
            Policy, or an adapter of one.
        main_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Main model. If `None`, the one that the policy was trained for.
        reasoner_kwargs (`dict`, *optional*):
            Further arguments of [`LatentReasoner.from_pretrained`].
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(
        self,
        model: LatentPolicyModel | PeftModel,
        *args,
        main_model: str | PreTrainedModel | None = None,
        reasoner_kwargs: dict | None = None,
        **kwargs,
    ):
        super().__init__(model, *args, **kwargs)
        same = {"device": self.device, "revision": getattr(model.config, "_commit_hash", None)}
        self.reasoner = LatentReasoner.from_pretrained(
            model.config.name_or_path, main_model, **{**same, **(reasoner_kwargs or {})}
        )

    def __call__(self, inputs, *args, **kwargs):
        if isinstance(inputs, (list, tuple)) and not inputs:
            raise ValueError(f"The prompts must be at least one, got {inputs!r}.")
        return super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(self, **kwargs):
        return {}, kwargs, {}

    def preprocess(self, prompt):
        return {"prompt": prompt}

    def _forward(self, inputs, **kwargs):
        # One prompt, or in a batch a list of them: a chat is no list, transformers wraps it
        prompts = inputs["prompt"] if isinstance(inputs["prompt"], list) else [inputs["prompt"]]
        prompts = [getattr(prompt, "messages", prompt) for prompt in prompts]
        return {"text": self.reasoner.generate(prompts, **kwargs).texts}

    def postprocess(self, outputs):
        (text,) = outputs["text"] if isinstance(outputs["text"], list) else [outputs["text"]]
        return [{"generated_text": text}]


PIPELINE_REGISTRY.register_pipeline("latent-reasoning", LatentReasoningPipeline, PolicyOrAdapter, type="text")
