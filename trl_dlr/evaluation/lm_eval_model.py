# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
A policy and its main model as the model `trl_dlr` of
[lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness).

The harness finds the models of other packages by nothing but their import, so this module is also its command:

    python -m trl_dlr.evaluation.lm_eval_model --model trl_dlr --model_args pretrained=<policy> --tasks gsm8k
"""

import itertools
import json
import math

import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from ..generation import TransformersEngine
from ..models.main_model import completion_log_probs
from ..reasoners.latent_reasoner import SELECTIONS, LatentReasoner
from ..rewards import majority_vote


# What a task may say about decoding; those of sampling say nothing where decoding is greedy
GENERATION_KWARGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class Conversation(str):
    """Messages as JSON, which assistant and main model each render with a template of their own."""


@register_model("trl_dlr")
class LatentReasonerLM(TemplateLM):
    """
    Model of lm-evaluation-harness that answers, and scores answers, through latents.

    Example:

    ```python
    >>> import lm_eval

    >>> import trl_dlr.evaluation.lm_eval_model  # registers the model

    >>> lm_eval.simple_evaluate("trl_dlr", {"pretrained": "user/policy"}, tasks=["gsm8k"], apply_chat_template=True)
    ```

    Args:
        pretrained (`str` or [`LatentReasoner`]):
            Hub id or folder of a policy, or a policy that has been loaded with its main model.
        main_model (`str`, *optional*):
            Main model. If `None`, the one that the policy was trained for.
        engine (`str`, *optional*, defaults to `"transformers"`):
            What decodes: `"transformers"`, `"vllm"` or URLs of vLLM servers. Only the first can score answers.
        dtype (`str`, *optional*):
            Dtype of the main model. If `None`, the one that the policy was trained with.
        max_gen_toks (`int`, *optional*):
            Tokens of an answer at most, where a task does not say. If `None`, as many as the policy was trained with.
        do_sample (`bool`, *optional*, defaults to `False`):
            Whether latents are sampled. If not, the mean of every step is taken. The main model decodes greedily.
        num_samples (`int`, *optional*, defaults to `1`):
            Trajectories per question, where they are sampled. The likelihood of an answer is the mean over them.
        selection (`str`, *optional*, defaults to `"first"`):
            Which of several answers counts: the `"first"`, the `"majority"` answer, or the `"best"` by the value head.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the latents, for each task. The harness's `--seed` has no part in them.
        batch_size (`int`, *optional*, defaults to `1`):
            Questions in a batch.
        device (`str`, *optional*):
            Where policy and main model go. If `None`, a GPU if there is one.
        **reasoner_kwargs:
            Further arguments of [`LatentReasoner.from_pretrained`], such as `revision`.
    """

    def __init__(
        self,
        pretrained: str | LatentReasoner,
        main_model: str | None = None,
        engine: str = "transformers",
        dtype: str | None = None,
        max_gen_toks: int | None = None,
        do_sample: bool = False,
        num_samples: int = 1,
        selection: str = "first",
        seed: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        **reasoner_kwargs,
    ):
        super().__init__()
        if PartialState().num_processes > 1:
            raise ValueError(
                f"`trl_dlr` runs in one process, but {PartialState().num_processes} were launched. Start it with "
                "`python`; several GPUs go to `engine='vllm'` or to a vLLM server."
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` must be a number of questions, at least 1, got {batch_size!r}.")
        if num_samples < 1 or (num_samples > 1 and not do_sample):
            raise ValueError(
                f"`num_samples` must be 1 without `do_sample=true`, and at least 1 with it, got {num_samples}."
            )
        if selection not in SELECTIONS:
            raise ValueError(f"`selection` must be one of {', '.join(SELECTIONS)}, got {selection!r}.")
        if device == "cuda:0" and not torch.cuda.is_available():  # which the harness says where its user does not
            device = None
        if isinstance(pretrained, str):
            if dtype is not None:
                reasoner_kwargs["main_model_init_kwargs"] = {"dtype": dtype}
            pretrained = LatentReasoner.from_pretrained(
                pretrained, main_model, engine=engine, max_new_tokens=max_gen_toks, device=device, **reasoner_kwargs
            )
        else:
            engine = None if engine == "transformers" else engine
            of_loading = {"main_model": main_model, "engine": engine, "dtype": dtype, "max_gen_toks": max_gen_toks}
            for name, value in {**of_loading, **reasoner_kwargs}.items():
                if value is not None:
                    raise ValueError(f"`{name}` has no meaning for a `pretrained` that is a reasoner: load it so.")
        self.reasoner = pretrained
        self.tokenizer = pretrained.main_processing_class
        self.do_sample = do_sample
        self.num_samples = num_samples
        self.selection = selection
        self.seed = seed
        self.max_gen_toks = pretrained.engine.max_new_tokens
        self.batch_size = int(batch_size)
        self._device = pretrained.policy.device

    def get_model_info(self) -> dict:
        """What the harness writes beside its results."""
        config = self.reasoner.policy.config
        names = "main_model_name_or_path", "main_model_revision", "main_model_fingerprint", "num_latents", "latent_dim"
        return {name: getattr(config, name) for name in names}

    # ---- Text and tokens ----

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, **special)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation itself: it is rendered twice, with the assistant's template and with the main model's."""
        if not add_generation_prompt:
            raise ValueError(
                "A task with `gen_prefix` cannot be given a chat template: latents follow the generation prompt, and "
                "no policy was trained to have an answer begun before them."
            )
        return Conversation(json.dumps(chat_history))

    def _prompts(self, contexts: list[str]) -> list:
        if not all(contexts):
            raise ValueError(
                "`trl_dlr` needs a context, which latents are drawn for, but a task's is empty. For the main model "
                "alone, use `--model hf`."
            )
        return [json.loads(context) if isinstance(context, Conversation) else context for context in contexts]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not isinstance(context, Conversation):
            return super()._encode_pair(context, continuation)
        prompt_ids = self.reasoner.tokenize_for_main_model(self._prompts([context]))[0]
        return prompt_ids, self.tok_encode(continuation, add_special_tokens=False)

    # ---- Requests ----

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = []
        progress = tqdm(total=len(requests), desc="Answers", disable=disable_tqdm)
        for (_, kwargs), group in itertools.groupby(
            requests, key=lambda request: (request.task_name, request.args[1])
        ):
            contexts = [request.args[0] for request in group]
            until = self._prepare_decoding(kwargs)
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                for start in range(0, len(contexts), self.batch_size):
                    batch = contexts[start : start + self.batch_size]
                    for context, answer in zip(batch, self._answer(batch, until), strict=True):
                        answers.append(answer)
                        self.cache_hook.add_partial("generate_until", (context, kwargs), answer)
                        progress.update()
        progress.close()
        self.reasoner.engine.max_new_tokens = self.max_gen_toks
        return answers

    def _prepare_decoding(self, kwargs: dict) -> list[str]:
        """Take over what a task says about decoding, and return its stop strings."""
        kwargs = normalize_gen_kwargs(kwargs, default_max_gen_toks=self.max_gen_toks)
        if unknown := sorted(kwargs.keys() - GENERATION_KWARGS):
            raise ValueError(f"`generation_kwargs` of a task may set {sorted(GENERATION_KWARGS)}, but set {unknown}.")
        if kwargs["do_sample"]:
            raise ValueError(
                "A task's `generation_kwargs` ask for sampled tokens, but the main model decodes greedily. Pass "
                "`--gen_kwargs do_sample=false,temperature=0`, and `do_sample=true` among `--model_args` to sample "
                "latents."
            )
        self.reasoner.engine.max_new_tokens = kwargs["max_gen_toks"]
        return kwargs["until"]

    def _answer(self, contexts: list[str], until: list[str]) -> list[str]:
        # A vote is on what is left before the stop strings
        selection = "first" if self.selection == "majority" else self.selection
        output = self.reasoner.generate(self._prompts(contexts), self.num_samples, self.do_sample, selection)
        candidates = [[postprocess_generated_text(text, until, None) for text in texts] for texts in output.candidates]
        return [texts[majority_vote(texts) if self.selection == "majority" else 0] for texts in candidates]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._prompts([request.args[0] for request in requests])  # none is empty
        return super().loglikelihood(requests, disable_tqdm)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        engine, policy, num_samples = self.reasoner.engine, self.reasoner.policy, self.num_samples
        if not isinstance(engine, TransformersEngine):
            raise ValueError(
                f"Tasks that score given answers need `engine=transformers`; {type(engine).__name__} only writes "
                "answers."
            )
        length = max(len(prompt_ids) + len(answer_ids) for _, prompt_ids, answer_ids in requests)
        length += policy.config.num_latents
        if engine.max_positions is not None and length > engine.max_positions:
            raise ValueError(
                f"Context, latents and answer have {length} tokens, more than the main model's {engine.max_positions} "
                "positions. Use fewer few-shot examples."
            )
        # All answers to a question are scored with the same latents
        contexts = list(dict.fromkeys(context for (context, _), _, _ in requests))
        latents_of = {}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for start in range(0, len(contexts), self.batch_size):
                batch = contexts[start : start + self.batch_size]
                drawn = self.reasoner.sample_latents(self._prompts(batch), num_samples, not self.do_sample)
                latents_of |= zip(batch, zip(*(part.split(num_samples) for part in drawn), strict=True), strict=True)
        results = [None] * len(requests)
        by_length = sorted(range(len(requests)), key=lambda index: -len(requests[index][1] + requests[index][2]))
        progress = tqdm(total=len(requests), desc="Likelihoods", disable=disable_tqdm)
        for start in range(0, len(requests), self.batch_size):
            indices = by_length[start : start + self.batch_size]
            texts, prompt_ids, answer_ids = zip(*(requests[index] for index in indices), strict=True)
            latents, lengths = zip(*(latents_of[context] for context, _ in texts), strict=True)
            log_probs, is_greedy = completion_log_probs(
                engine.model,
                [ids for ids in prompt_ids for _ in range(num_samples)],
                [ids for ids in answer_ids for _ in range(num_samples)],
                policy.inject(torch.cat(latents)),
                torch.cat(lengths),
                policy.config.anchor_ids,
            )
            sums = torch.stack([row.sum() for row in log_probs]).unflatten(0, (-1, num_samples))
            means = sums.logsumexp(1) - math.log(num_samples)  # of the likelihoods
            is_likely = torch.tensor(is_greedy).unflatten(0, (-1, num_samples)).float().mean(1) > 0.5
            for index, text, mean, likely in zip(indices, texts, means.tolist(), is_likely.tolist(), strict=True):
                results[index] = mean, likely
                self.cache_hook.add_partial("loglikelihood", text, results[index])
                progress.update()
        progress.close()
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise ValueError(
            "`trl_dlr` does not score whole documents: they hold no question that latents could be drawn for. For "
            "the main model alone, use `--model hf`."
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
