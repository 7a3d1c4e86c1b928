# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a run of [`LatentGRPOTrainer`] takes of a GPU's memory, from the models' shapes alone."""

import contextlib
import copy
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel

from .models import DiagonalGaussian
from .models.main_model import CACHE_ARGUMENT
from .models.value_head import ValueHead
from .trainer.latent_grpo_config import LatentGRPOConfig
from .trainer.latent_grpo_trainer import LatentGRPOTrainer
from .trainer.losses import contrastive_loss
from .trainer.policy_training import PolicyTrainingMixin
from .trainer.prescreening import REPLAY_SIZE


ZERO_STAGES = (0, 2)
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
MAIN_MODEL_BITS = (None, 4, 8)
REDUCE_BUCKET_SIZE = 500_000_000  # DeepSpeed's default
STEP_COUNT = 4  # bytes: AdamW counts the steps of every tensor in a float32


@dataclass
class MemoryPlan:
    """
    Bytes on each GPU.

    Args:
        parameters (`int`):
            The policy's weights and buffers, in the precision that they are trained in.
        gradients (`int`):
            Gradients that wait for the optimizer, on the process that holds most.
        optimizer_states (`int`):
            AdamW's moments and step counts, and under DeepSpeed the float32 master weights.
        main_model (`int`):
            Weights of the frozen main model.
        reference (`int`):
            Weights of the frozen reference policy.
        value_head (`int`):
            Pre-screening: weights, gradients, AdamW's states and replay.
        communication (`int`):
            DDP's gradient buckets, or DeepSpeed's reduction bucket, which exists during a backward pass.
        stored_rollout (`int`):
            Latents, densities and groups that are kept from a rollout to its losses.
        kv_cache (`int`):
            The main model's KV cache of all that is decoded together, at its longest.
        activations (`int`):
            Most that the forward pass of one micro-batch of the policy needs.
        rollout_peak (`int`):
            Most in use while latents are sampled and decoded, with all that is there then.
        update_peak (`int`):
            Most in use during backward passes and the optimizer's step, with all that is there then.
    """

    parameters: int
    gradients: int
    optimizer_states: int
    main_model: int
    reference: int
    value_head: int
    communication: int
    stored_rollout: int
    kv_cache: int
    activations: int
    rollout_peak: int
    update_peak: int

    @property
    def total(self) -> int:
        """The larger of the two peaks."""
        return max(self.rollout_peak, self.update_peak)

    def fits(self, gigabytes: float) -> bool:
        """
        Whether the total peak is at most `gigabytes` * 10⁹ bytes. A GPU sold with N GB has about N * 2³⁰ bytes: the 7%
        between are left to the CUDA context, communication libraries and the allocator's fragmentation.
        """
        return self.total <= gigabytes * 1e9


class LiveBytes(TorchDispatchMode):
    """
    Follows the bytes of all tensors that operations make, until they are freed, and remembers the peak.

    Args:
        known (`Iterable[torch.Tensor]`):
            Tensors that are there before, and are not counted.
        results (`dict[Callable, Callable]`, *optional*):
            Stand-ins for operations whose result has a shape that depends on data.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), results: dict[Callable, Callable] | None = None):
        super().__init__()
        self.results = results or {}
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = self.results.get(func, func)(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return output

    def _free(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.live -= num_bytes


class Zero2Gradients:
    """
    Gradients under DeepSpeed's ZeRO-2 (`runtime/zero/stage_1_and_2.py`): each is copied into a bucket; a full bucket is
    copied once more, reduced, and what this process owns of it is kept. Passes after the first add to what is kept.
    """

    def __init__(self, parameters: list[nn.Parameter], num_owned: int, bucket_size: int):
        self.num_owned, self.bucket_size = num_owned, bucket_size
        self.bucket = self.owned = self.accumulated = None
        self.filled = 0
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: nn.Parameter) -> None:
        if self.bucket is None:
            self.bucket = parameter.new_empty(self.bucket_size)
        if self.filled + parameter.numel() > self.bucket_size:
            self._reduce()
        self.filled += parameter.numel()
        parameter.grad = None

    def _reduce(self) -> None:
        self.bucket.new_empty(self.filled)  # what is sent, and freed again
        if self.owned is None:
            self.owned = self.bucket.new_empty(self.num_owned)
        self.filled = 0

    def end_backward(self) -> None:
        self._reduce()
        self.accumulated = self.owned if self.accumulated is None else self.accumulated
        self.bucket = self.owned = None


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def stand_in(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy whose weights (in `dtype` if given, buffers as they are) are fake tensors, which hold nothing."""
    memo = {}
    for tensor in tensors_of(module):
        if isinstance(tensor, nn.Parameter):
            fake = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
            memo[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copy.deepcopy(module, memo)


def optimizer_groups(policy: nn.Module, args: LatentGRPOConfig) -> list[list[nn.Parameter]]:
    """The trainable parameters as the trainer's optimizer groups them."""
    decayed = set(LatentGRPOTrainer.get_decay_parameter_names(None, policy))  # which asks nothing of a trainer
    is_split = args.projection_learning_rate is not None or args.projection_max_grad_norm is not None
    groups = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            is_apart = is_split and PolicyTrainingMixin._is_projection(name)
            groups.setdefault((name in decayed, is_apart), []).append(parameter)
    return list(groups.values())


@dataclass
class Zero2Layout:
    """How ZeRO-2 splits groups of parameters: each is one flat tensor, padded so that all partitions are alike."""

    partitions: list[int]  # elements of each group's
    padding: int  # elements, of all groups
    num_owned: int = 0  # gradient elements that a process keeps: all of a tensor that reaches into its partition
    largest_share: int = 0  # elements of one tensor in one partition

    @classmethod
    def of(cls, groups: list[list[nn.Parameter]], num_processes: int) -> "Zero2Layout":
        sizes = [[parameter.numel() for parameter in group] for group in groups]
        unit = 2 * num_processes  # partitions start at even places
        partitions = [math.ceil(sum(group) / unit) * 2 for group in sizes]
        layout = cls(partitions, num_processes * sum(partitions) - sum(map(sum, sizes)))
        for process in range(num_processes):
            owned = 0
            for group, size in zip(sizes, partitions, strict=True):
                first, last = process * size, (process + 1) * size
                ends = list(itertools.accumulate(group))
                for numel, end in zip(group, ends, strict=True):
                    share = min(end, last) - max(end - numel, first)
                    owned += numel if share > 0 else 0
                    layout.largest_share = max(layout.largest_share, share)
                owned += max(last - max(ends[-1], first), 0)  # zeros behind the last tensor
            layout.num_owned = max(layout.num_owned, owned)
        return layout


def known_shapes(readings: int, rows: int, samples: int = 0) -> dict[Callable, Callable]:
    """Results of the policy's operations whose shape depends on data: which rows are alike, and samples of each."""

    def unique_rows(tensor: torch.Tensor, *_, **__) -> tuple[torch.Tensor, ...]:
        return tensor[:readings].clone(), torch.zeros(rows, dtype=torch.long), torch.zeros(readings, dtype=torch.long)

    return {
        torch.ops.aten.unique_dim.default: unique_rows,
        torch.ops.aten.repeat_interleave.Tensor: lambda *_, **__: torch.zeros(samples, dtype=torch.long),
    }


def decode(
    main_model: PreTrainedModel, questions: int, rows: int, prompt_length: int, num_latents: int, max_new_tokens: int
) -> int:
    """The steps of [`TransformersEngine`] that need most: prompts, latents, the last token. Returns the cache's bytes."""
    embed, head = main_model.get_input_embeddings(), main_model.get_output_embeddings()
    prompt_ids = torch.zeros(questions, prompt_length, dtype=torch.long)
    cache = DynamicCache(config=main_model.config)

    def forward(embeds: torch.Tensor, length: int) -> torch.Tensor:
        mask = torch.ones(len(embeds), length, dtype=torch.long)
        positions = (mask.cumsum(-1) - 1)[:, -embeds.size(1) :]
        return main_model.base_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{CACHE_ARGUMENT: cache},
        ).last_hidden_state

    def next_token(hidden_states: torch.Tensor) -> torch.Tensor:
        scores = head(hidden_states[:, -1:].contiguous())[:, -1].to(torch.float32, copy=True)
        return scores.argmax(-1, keepdim=True)

    embeds = embed(prompt_ids)
    forward(embeds, prompt_length)
    prompt_of = torch.zeros(rows, dtype=torch.long)
    cache.reorder_cache(prompt_of)
    latents = torch.zeros(rows, num_latents, embed.embedding_dim)
    embeds = torch.cat([embeds[prompt_of], latents.to(embeds)], dim=1)  # `generate` wants all of it
    length = prompt_length + num_latents
    ids = next_token(forward(embeds[:, prompt_length:], length))
    between = max_new_tokens - 2
    if between > 0:  # tokens between the first and the last
        for place, layer in enumerate(cache.layers):
            new = [
                states.new_empty(*states.shape[:2], between, states.shape[-1]) for states in (layer.keys, layer.values)
            ]
            cache.update(*new, place)
            del new
    if between >= 0:
        next_token(forward(embed(ids), length + between + 1))
    return num_bytes(states for layer in cache.layers for states in (layer.keys, layer.values))


def update_loss(policy: nn.Module, latents: torch.Tensor, prompt_length: int, args: LatentGRPOConfig) -> torch.Tensor:
    """What the trainer's loss of one micro-batch keeps for its backward pass."""
    rows = len(latents)
    prompt_ids = torch.zeros(rows, prompt_length, dtype=torch.long)
    density = policy(input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), latents=latents).density
    loss = density.log_prob(latents).sum() + density.entropy().sum()
    if args.beta != 0.0:
        loss = loss + density.kl(DiagonalGaussian(latents, density.log_std.detach())).sum()
    if args.gamma != 0.0:
        group = latents.new_empty(rows, args.num_generations, *latents.shape[1:])
        stored = group, torch.empty_like(group), torch.zeros(rows, dtype=torch.long)
        terms = contrastive_loss(
            density.rsample(latents), density.mean, *stored, similarity=args.contrastive_similarity
        )
        loss = loss + terms.sum()
    return loss


def plan_memory(
    policy: PreTrainedModel,
    main_model: PreTrainedModel,
    args: LatentGRPOConfig,
    *,
    prompt_length: int,
    num_processes: int = 1,
    zero_stage: int = 0,
    main_model_bits: int | None = None,
    reduce_bucket_size: int = REDUCE_BUCKET_SIZE,
) -> MemoryPlan:
    """
    Memory of a run on each of its GPUs. Nothing is computed: the models are followed through sampling, decoding and
    updating with tensors that hold nothing, so they may be on the `meta` device.

    Weights, gradients and optimizer states are exact, except for a quantized main model. Prompts are taken to differ in
    length, as then an attention mask is made; allocator fragmentation and CUDA's own memory are not counted.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            [`LatentPolicyModel`], in float32 unless it is trained in another precision. With an adapter it is its own
            reference.
        main_model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM, in the precision that it decodes in.
        args ([`LatentGRPOConfig`]):
            Configuration of the run.
        prompt_length (`int`):
            Tokens of the longest prompts.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of GPUs.
        zero_stage (`int`, *optional*, defaults to `0`):
            0 for one process or DDP, 2 for DeepSpeed ZeRO-2.
        main_model_bits (`int`, *optional*):
            4 or 8 if bitsandbytes quantizes the main model: its size is then approximate.
        reduce_bucket_size (`int`, *optional*, defaults to `500000000`):
            Elements of DeepSpeed's reduction bucket (`zero_optimization.reduce_bucket_size`).

    Returns:
        [`MemoryPlan`]

    Raises:
        `ValueError`: if an argument does not fit, with its name, the value seen and what would be right.
    """
    optimizer = getattr(args.optim, "value", args.optim)
    choices = {"zero_stage": (zero_stage, ZERO_STAGES), "main_model_bits": (main_model_bits, MAIN_MODEL_BITS)}
    for name, (value, known) in {**choices, "args.optim": (optimizer, OPTIMIZERS)}.items():
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, known))} to be planned, got {value!r}.")
    for name, value in {"prompt_length": prompt_length, "num_processes": num_processes}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if args.use_vllm:
        raise ValueError(
            "`use_vllm=True` leaves the main model's memory to vLLM (`vllm_gpu_memory_utilization`, or a server of its "
            "own). Plan with `use_vllm=False`."
        )
    if (policy.get_base_model() if is_peft_model(policy) else policy).config.density == "soft_tokens":
        raise ValueError(
            "Soft tokens (`latent_density='soft_tokens'`) are not planned: their latents are as large as the vocabulary. "
            "Plan a policy of Gaussian latents, or measure a step."
        )
    if args.hybrid_coef > 0:
        raise ValueError(
            f"`hybrid_coef={args.hybrid_coef}` passes gradients through the main model, whose activations are not "
            "planned. Plan with `hybrid_coef=0`, and leave room for them."
        )
    is_sharded = zero_stage == 2
    rows = args.per_device_train_batch_size * args.steps_per_generation  # of a process's rollout
    questions = math.ceil(rows / args.num_generations)
    decodes_all = args.prescreening_fraction == 1 or args.prescreening_warmup_rollouts > 0
    num_decoded = rows if decodes_all else min(rows, questions * args.num_decoded)
    scored = args.per_device_train_batch_size
    if args.gamma == 0.0:  # only the contrastive loss is of trajectories that were not decoded
        scored = min(scored, num_decoded)

    with FakeTensorMode():
        # DeepSpeed casts the module, buffers excepted; without it autocast computes in bfloat16 from float32 weights
        dtype = torch.bfloat16 if is_sharded and args.bf16 else None
        trained = stand_in(policy, dtype).train()
        base = trained.get_base_model() if is_peft_model(trained) else trained
        base.injector.requires_grad_(False)
        base.config.learn_stop = False  # all steps, which is the most that a learned stop takes
        num_latents, latent_dim = base.config.num_latents, base.config.latent_dim
        trainable = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        groups = optimizer_groups(trained, args)
        element = trainable[0].element_size()
        if is_sharded:
            layout = Zero2Layout.of(groups, num_processes)
            num_owned, padding = layout.num_owned, layout.padding
            moments = sum(2 * 4 * size + STEP_COUNT for size in layout.partitions)
            optimizer_states = moments + 4 * sum(layout.partitions)  # float32 weights to step
        else:
            num_owned, padding = sum(parameter.numel() for parameter in trainable), 0
            moments = optimizer_states = 2 * num_bytes(trainable) + STEP_COUNT * len(trainable)
        parameters = num_bytes(tensors_of(trained)) + padding * element
        gradients = num_owned * element
        buckets = 0 if is_sharded or num_processes == 1 else gradients

        reference = 0  # in the policy's precision
        if args.beta != 0.0 and not is_peft_model(policy):
            reference = num_bytes(tensors_of(trained))
        value_head = 0
        if args.prescreening_fraction < 1:
            sizes = num_latents * latent_dim, base.config.hidden_size
            head = list(ValueHead(*sizes).parameters())
            value_head = 4 * num_bytes(head) + STEP_COUNT * len(head) + REPLAY_SIZE * 4 * (sum(sizes) + 1)
        main_bytes = num_bytes(tensors_of(main_model))
        if main_model_bits is not None:
            packed = [module.weight for module in main_model.base_model.modules() if isinstance(module, nn.Linear)]
            # with a float32 scale for every 64 weights (4 bit) or row (8 bit)
            scales = sum(4 * (w.numel() // 64 if main_model_bits == 4 else w.size(0)) for w in packed)
            main_bytes += sum(w.numel() for w in packed) * main_model_bits // 8 + scales - num_bytes(packed)
        trajectory = 4 * num_latents * latent_dim
        stored = rows * trajectory * (2 + (args.beta != 0.0) + (args.gamma != 0.0))
        stored += 2 * num_processes * rows * trajectory * (args.gamma != 0.0)
        always = parameters + optimizer_states + main_bytes + reference + value_head + buckets

        def autocast() -> contextlib.AbstractContextManager:
            return torch.autocast("cpu", torch.bfloat16, enabled=args.bf16 and not is_sharded)

        # What a rollout needs beyond that
        speaking = stand_in(main_model)

        def rollout(rows: int, num_decoded: int) -> tuple[int, int]:
            questions = math.ceil(rows / args.num_generations)
            shapes = known_shapes(readings=questions, rows=questions, samples=rows)
            with torch.no_grad(), LiveBytes(tensors_of(trained), shapes) as sampling, autocast():
                prompt_ids = torch.zeros(questions, prompt_length, dtype=torch.long)
                base.sample(prompt_ids, torch.ones_like(prompt_ids), args.num_generations)
            together = min(num_decoded, args.decoding_batch_size or num_decoded)
            prompts = math.ceil(together * questions / num_decoded)
            with torch.no_grad(), LiveBytes(tensors_of(speaking)) as decoding:
                kv_cache = decode(speaking, prompts, together, prompt_length, num_latents, args.max_completion_length)
            return max(sampling.peak, decoding.peak), kv_cache

        between_steps = args.steps_per_generation * args.num_iterations % args.gradient_accumulation_steps == 0
        peak, kv_cache = rollout(rows, num_decoded)
        rollout_peak = always + stored + peak + (0 if between_steps else gradients)
        checked = math.ceil(args.exploration_check_prompts / num_processes) * args.num_generations
        if checked > num_decoded:  # all decoded, before the optimizer has any moments
            peak, longest = rollout(checked, checked)
            if always - moments + peak > rollout_peak:
                rollout_peak, kv_cache = always - moments + peak, longest

        # What an update needs
        if args.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        sharded = Zero2Gradients(trainable, num_owned, reduce_bucket_size) if is_sharded else None
        shapes = known_shapes(readings=min(scored, questions), rows=scored)
        activations = 0
        with LiveBytes(tensors_of(trained), shapes) as updating:
            for _ in range(min(args.gradient_accumulation_steps, 2)):  # those after the second are like it
                with autocast():
                    loss = update_loss(trained, torch.zeros(scored, num_latents, latent_dim), prompt_length, args)
                activations = activations or updating.peak
                loss.backward()
                del loss
                if sharded is not None:
                    sharded.end_backward()
        stepping = gradients
        is_fused = optimizer == "adamw_torch_fused"
        if is_sharded:
            # Norms are float64; each group's partition in turn is flattened, cast to float32 and stepped
            copies = 4 + (0 if element == 4 else element) + (0 if is_fused else 4)
            stepping += max(8 * layout.largest_share, copies * max(layout.partitions))
        elif not is_fused:
            stepping += max(num_bytes(group) for group in groups)
        update_peak = always + stored + max(updating.peak, stepping)

    return MemoryPlan(
        parameters=parameters,
        gradients=gradients,
        optimizer_states=optimizer_states,
        main_model=main_bytes,
        reference=reference,
        value_head=value_head,
        communication=reduce_bucket_size * element if is_sharded else buckets,
        stored_rollout=stored,
        kv_cache=kv_cache,
        activations=activations,
        rollout_peak=rollout_peak,
        update_peak=update_peak,
    )
