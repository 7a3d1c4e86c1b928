# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a run of [`LatentGRPOTrainer`] takes of a GPU's memory, from the models' shapes alone."""

import copy
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel

from .generation.graphed_decoding import can_be_graphed, is_plainly_greedy, static_length
from .models.architectures import CACHE_ARGUMENT, text_backbone
from .models.value_head import ValueHead
from .trainer import LatentGRPOConfig, LatentGRPOTrainer
from .trainer.prescreening import REPLAY_SIZE


@dataclass
class MemoryPlan:
    """Bytes on each GPU."""

    parameters: int  # the policy's weights and buffers, in the precision that they are trained in
    gradients: int  # those that wait for the optimizer, on the process that holds most
    optimizer_states: int  # AdamW's moments and step counts, and under DeepSpeed the float32 master weights
    main_model: int  # weights of the frozen main model
    reference: int  # weights of the frozen reference policy
    value_head: int  # pre-screening: weights, gradients, AdamW's states and replay
    stored_rollout: int  # latents, densities and groups that are kept from a rollout to its losses
    kv_cache: int  # the main model's, of all that is decoded together, at its longest
    rollout_peak: int  # most in use while latents are sampled and decoded, with all that is there then
    update_peak: int  # most in use in backward passes and the optimizer's step, with all that is there then

    @property
    def total(self) -> int:
        """The larger of the two peaks."""
        return max(self.rollout_peak, self.update_peak)


KEPT_BY_LAYERS = ("keys", "values", "conv_states", "recurrent_states")


def cache_tensors(model: PreTrainedModel, rows: int, length: int, element: int) -> list[int]:
    """Bytes of what each layer keeps of `rows` of `length` tokens, computed in `element` bytes a number."""
    config = copy.deepcopy(model.config.get_text_config())
    config._experts_implementation = "batched_mm"  # which runs on the meta device, in every precision
    config.pad_token_id = None  # which GPT-2 would look for, among numbers that are not there
    cache = DynamicCache(config=config)
    with torch.device("meta"), torch.no_grad():
        backbone = type(text_backbone(model))(config).to(torch.float32 if element == 4 else torch.bfloat16)
        ids = torch.zeros(rows, length, dtype=torch.long)
        backbone(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    kept = [getattr(layer, name, None) for layer in cache.layers for name in KEPT_BY_LAYERS]
    kept = [states for part in kept for states in (part.values() if isinstance(part, dict) else [part])]
    return [states.nbytes for states in kept if states is not None]


def zero2_partitions(groups: list[list[int]], num_processes: int) -> tuple[list[int], int]:
    """Size of each group's partitions under ZeRO-2, and the most gradient elements that a process keeps."""
    partitions, kept = [], [0] * num_processes
    for sizes in groups:  # one flat tensor, padded so that its partitions are alike and even
        partitions.append(partition := 2 * math.ceil(sum(sizes) / (2 * num_processes)))
        ends = list(itertools.accumulate(sizes))
        for process in range(num_processes):
            first, last = process * partition, (process + 1) * partition
            # All of a tensor that reaches into the partition, and zeros behind the last tensor
            kept[process] += sum(n for n, end in zip(sizes, ends, strict=True) if first < end and end - n < last)
            kept[process] += max(last - max(ends[-1], first), 0)
    return partitions, max(kept)


def plan_memory(
    policy: PreTrainedModel,
    main_model: PreTrainedModel,
    args: LatentGRPOConfig,
    *,
    prompt_length: int,
    num_processes: int = 1,
    zero_stage: int = 0,
    main_model_bits: int | None = None,
    reduce_bucket_size: int = 500_000_000,
    on_gpu: bool = True,
) -> MemoryPlan:
    """
    Memory of a run on each of its GPUs, by the formulas of docs/memory.md. The models may be on the `meta` device.
    Peaks and a quantized main model are estimates, all else is exact. What cannot be planned is a `ValueError`.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            [`LatentPolicyModel`], in float32 unless it is trained in another precision.
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
            4 or 8 if bitsandbytes quantizes the main model.
        reduce_bucket_size (`int`, *optional*, defaults to `500000000`):
            DeepSpeed's `zero_optimization.reduce_bucket_size`, in elements.
        on_gpu (`bool`, *optional*, defaults to `True`):
            Whether it is a GPU, where greedy decoding of most models keeps its cache, see [`GraphedDecoding`].

    Returns:
        [`MemoryPlan`]
    """
    base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    check_can_be_planned(base, args, prompt_length, num_processes, zero_stage, main_model_bits)
    is_sharded = zero_stage == 2
    trained = trained_memory(policy, args, num_processes, is_sharded)

    # What else is always there
    reference = trained.weights if args.beta != 0.0 and base is policy else 0  # an adapter can be switched off
    main_bytes = main_model_memory(main_model, main_model_bits)
    num_latents, trajectory = base.config.num_latents, base.config.num_latents * base.config.latent_dim
    value_head = 0
    if args.prescreening_fraction < 1:
        value_head = 4 * REPLAY_SIZE * (trajectory + base.config.hidden_size + 1)
        value_head += sum(4 * w.nbytes + 4 for w in ValueHead(trajectory, base.config.hidden_size).parameters())
    always = trained.parameters + trained.optimizer_states + main_bytes + reference + value_head
    always += trained.gradients if num_processes > 1 and not is_sharded else 0  # DDP's buckets

    # Rollouts, and the exploration check, which decodes all that it samples before the optimizer has moments
    rows = args.per_device_train_batch_size * args.steps_per_generation
    questions = math.ceil(rows / args.num_generations)
    num_decoded = rows if args.prescreening_warmup_rollouts > 0 else min(rows, questions * args.num_decoded)
    stored = 4 * rows * trajectory * (2 + (args.beta != 0.0) + (args.gamma != 0.0) * (1 + 2 * num_processes))
    rollouts = []
    if num_checked := math.ceil(args.exploration_check_prompts / num_processes) * args.num_generations:
        rollouts.append((num_checked, num_checked, always - trained.moments))
    rollouts.append((rows, num_decoded, always + stored))
    feeds_latents, fed_length = base.config.latent_sampling == "autoregressive", prompt_length + num_latents - 1
    is_graphed = on_gpu and main_model_bits is None and can_be_graphed(main_model)
    is_graphed = is_graphed and is_plainly_greedy(args.generation_kwargs or {})
    kv_cache = rollout = 0
    for sampled, decoded, beside in rollouts:
        sampling = cache_tensors(base.assistant, sampled, fed_length, trained.element) if feeds_latents else [0]
        together = min(decoded, args.decoding_batch_size or decoded)
        length = fed_length + args.max_completion_length  # the last token is never fed
        if is_graphed:
            length = static_length(length + 1)
        decoding = cache_tensors(main_model, together, length, main_model.dtype.itemsize)
        kv_cache = max(kv_cache, sum(decoding))
        if is_graphed:  # it stays, and is filled layer by layer from one of the prompts
            num_prompts = math.ceil(sampled / args.num_generations)
            prompts = cache_tensors(main_model, num_prompts, prompt_length, main_model.dtype.itemsize)
            rollout = max(rollout, beside + sum(decoding) + max(sum(sampling) + max(sampling), sum(prompts)))
        else:
            copied = max(sum(cache) + max(cache) for cache in (sampling, decoding))  # with one layer's keys
            rollout = max(rollout, beside + copied)

    # Updates
    scored = min(args.per_device_train_batch_size, num_decoded if args.gamma == 0.0 else rows)  # gamma scores all
    backward = backward_memory(base, args, trained, scored, min(scored, questions), prompt_length, is_sharded)
    backward += trained.element * reduce_bucket_size if is_sharded else 0
    kept = sum(decoding) if is_graphed else 0
    update = always + stored + kept + max(backward, trained.gradients + trained.copies)
    of_policy = trained.parameters, trained.gradients, trained.optimizer_states
    return MemoryPlan(*of_policy, main_bytes, reference, value_head, stored, kv_cache, rollout, update)


def check_can_be_planned(
    policy: PreTrainedModel,
    args: LatentGRPOConfig,
    prompt_length: int,
    num_processes: int,
    zero_stage: int,
    main_model_bits: int | None,
) -> None:
    """Refuse what has no formula here."""
    optimizer = getattr(args.optim, "value", args.optim)
    choices = {"zero_stage": (zero_stage, (0, 2)), "main_model_bits": (main_model_bits, (None, 4, 8))}
    choices["args.optim"] = optimizer, ("adamw_torch", "adamw_torch_fused")
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, known))} to be planned, got {value!r}.")
    for name, value in {"prompt_length": prompt_length, "num_processes": num_processes}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if args.use_vllm:
        raise ValueError("`use_vllm=True` leaves the main model's memory to vLLM. Plan with `use_vllm=False`.")
    if policy.config.latent_density == "soft_tokens":
        raise ValueError("Soft tokens (`latent_density='soft_tokens'`) are not planned. Measure a step.")
    if args.hybrid_coef > 0:
        reason = "passes gradients through the main model, whose activations are not planned. Plan with 0"
        raise ValueError(f"`hybrid_coef={args.hybrid_coef}` {reason}, and leave room for them.")


@dataclass
class TrainedMemory:
    """Bytes of the policy and of what its optimizer has of it, on each GPU."""

    element: int  # of a trained number
    num_trained: int  # numbers, not bytes
    weights: int  # whole, before anything is padded
    parameters: int
    gradients: int
    moments: int
    optimizer_states: int  # with moments
    copies: int  # that a step makes


def trained_memory(
    policy: PreTrainedModel, args: LatentGRPOConfig, num_processes: int, is_sharded: bool
) -> TrainedMemory:
    """What the policy and its optimizer take, exact to the byte but for the copies."""
    is_cast = is_sharded and args.bf16  # by DeepSpeed, buffers excepted; autocast leaves weights as they are
    weights = sum(weight.numel() * (2 if is_cast else weight.element_size()) for weight in policy.parameters())
    weights += sum(buffer.nbytes for buffer in policy.buffers())
    decayed = set(LatentGRPOTrainer.get_decay_parameter_names(None, policy))  # which asks nothing of a trainer
    is_split = args.projection_learning_rate is not None
    groups = defaultdict(list)  # sizes of the trained tensors, as the optimizer groups them
    for name, weight in policy.named_parameters():
        if weight.requires_grad and "injector" not in name.split("."):  # which hybrid gradients alone would train
            groups[name in decayed, is_split and LatentGRPOTrainer._is_projection(name)].append(weight.numel())
            element = 2 if is_cast else weight.element_size()
    num_trained = sum(map(sum, groups.values()))
    parameters, gradients = weights, element * num_trained
    moments = optimizer_states = 2 * gradients + 4 * sum(map(len, groups.values()))  # and a step count for each tensor
    # A step that is not fused copies second moments
    copies = gradients if getattr(args.optim, "value", args.optim) == "adamw_torch" else 0
    if is_sharded:
        partitions, num_kept = zero2_partitions(list(groups.values()), num_processes)
        parameters += element * (num_processes * sum(partitions) - num_trained)
        gradients = element * num_kept
        moments = 8 * sum(partitions) + 4 * len(partitions)
        optimizer_states = moments + 4 * sum(partitions)  # weights in float32
        copies = 8 * max(partitions)  # a group's gradients in float64 for their norm, or twice in float32
    return TrainedMemory(element, num_trained, weights, parameters, gradients, moments, optimizer_states, copies)


def main_model_memory(main_model: PreTrainedModel, bits: int | None) -> int:
    """The main model's weights and buffers, an estimate if it is quantized to 4 or 8 bits."""
    main_bytes = sum(tensor.nbytes for tensor in itertools.chain(main_model.parameters(), main_model.buffers()))
    if bits is not None:  # with a float32 scale for every 64 weights
        packed = [module.weight for module in main_model.base_model.modules() if isinstance(module, torch.nn.Linear)]
        main_bytes += sum(weight.numel() * (8 * bits + 4) // 64 - weight.nbytes for weight in packed)
    return main_bytes


def backward_memory(
    policy: PreTrainedModel,
    args: LatentGRPOConfig,
    trained: TrainedMemory,
    num_rows: int,
    num_readings: int,
    prompt_length: int,
    is_sharded: bool,
) -> int:
    """
    What a backward pass takes at most, of `num_rows` trajectories of which those of a question share its reading. Of a
    token in a layer autograd saves about 6 hidden states, 4 times all heads, 4 times the MLP's inside.
    """
    element, num_latents = trained.element, policy.config.num_latents
    assistant = policy.assistant.config.get_text_config()
    num_layers, hidden = assistant.num_hidden_layers, assistant.hidden_size * element
    attentions = [layer for layer in assistant.per_layer_config if getattr(layer, "num_attention_heads", None)]
    sizes = [
        layer.num_attention_heads
        * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
        for layer in attentions
    ]
    heads = element * max(sizes, default=assistant.hidden_size)
    inner = getattr(assistant, "intermediate_size", None) or 4 * assistant.hidden_size
    inner = element * (max(inner) if isinstance(inner, list) else inner)
    saved_token = 6 * hidden + 4 * heads + 4 * inner
    accumulated = trained.gradients if args.gradient_accumulation_steps > 1 else 0
    feeds_latents = policy.config.latent_sampling == "autoregressive"
    if feeds_latents and not args.gradient_checkpointing and not policy.has_recurrent_state:
        # Latents attend to keys and values that are repeated for each row. Autograd holds the gradients of the pass
        # over latents until it has been back through the one over questions, where the same weights were used
        last = num_layers * saved_token * num_readings * prompt_length
        saved = last + num_layers * num_rows * (
            saved_token * (num_latents - 1) + 2 * heads * (prompt_length + num_latents - 1)
        )
        waiting = element * trained.num_trained
    else:
        tokens = (prompt_length + num_latents) * (num_rows if feeds_latents else num_readings)
        last = saved_token * tokens  # of one layer
        saved = last + num_layers * hidden * tokens if args.gradient_checkpointing else num_layers * last
        waiting = 0 if accumulated or is_sharded else trained.gradients
    return accumulated + max(saved, last + waiting)
