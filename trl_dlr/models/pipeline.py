# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A policy and its main model as a transformers pipeline."""

from transformers import Pipeline, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY

from .latent_policy import LatentPolicyModel
from .reasoner import LatentReasoner


class LatentReasoningPipeline(Pipeline):
    """
    Pipeline `"latent-reasoning"`, a [`LatentReasoner`] behind the interface of [`~transformers.pipeline`].

    Example:

    ```python
    >>> import trl_dlr.models.pipeline  # registers the task
    >>> from transformers import pipeline

    >>> pipe = pipeline("latent-reasoning", model="user/policy")
    >>> pipe("What is 3 + 4?", num_samples=8, selection="majority")
    [{'generated_text': ...}]
    ```

    Args:
        model ([`LatentPolicyModel`]):
            Policy.
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
        model: LatentPolicyModel,
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

    def _sanitize_parameters(self, **kwargs):
        return {}, kwargs, {}

    def preprocess(self, prompt):
        return {"prompt": getattr(prompt, "messages", prompt)}  # transformers wraps conversations

    def _forward(self, inputs, **kwargs):
        return {"texts": self.reasoner.generate([inputs["prompt"]], **kwargs).texts}

    def postprocess(self, outputs):
        return [{"generated_text": text} for text in outputs["texts"]]


PIPELINE_REGISTRY.register_pipeline("latent-reasoning", LatentReasoningPipeline, LatentPolicyModel, type="text")
