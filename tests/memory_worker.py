# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Run by test_memory_plan.py in fresh processes: a few steps of a run whose memory is measured, and the plan of it."""

import ctypes
import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, TrainerCallback

from tests.tiny import LETTERS, tiny_config, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import length_reward, make_trainer
from trl_dlr import LatentGRPOTrainer, LatentPolicyModel
from trl_dlr.memory_plan import plan_memory


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def storage_bytes(tensors) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


class GradientRecorder(TrainerCallback):
    """Bytes of the gradients that the first optimizer step finds."""

    def __init__(self):
        self.trainer = self.num_bytes = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer is None or not self.trainer.is_deepspeed_enabled or state.global_step > 0:
            return
        zero = self.trainer.model_wrapped.optimizer  # steps before `on_pre_optimizer_step`
        step = zero.step

        def recording(*args, **kwargs):
            zero.step = step
            self.num_bytes = storage_bytes(part for parts in zero.averaged_gradients.values() for part in parts)
            return step(*args, **kwargs)

        zero.step = recording

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.num_bytes is None:
            self.num_bytes = storage_bytes(p.grad for p in model.parameters() if p.grad is not None)


def exact_bytes(trainer: LatentGRPOTrainer, recorder: GradientRecorder) -> dict[str, int]:
    """What the plan has to hit to the byte."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    optimizer, masters = trainer.optimizer, []
    if trainer.is_deepspeed_enabled:
        zero = trainer.model_wrapped.optimizer
        optimizer, masters = zero.optimizer, zero.single_partition_of_fp32_groups
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return {
        "parameters": storage_bytes([*policy.parameters(), *policy.buffers()]),
        "gradients": recorder.num_bytes,
        "optimizer_states": storage_bytes([*states, *masters]),
    }


def random_model(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[config.eos_token_id] = 0  # never the most likely: completions are whole
    return model


def prompts(length: int, num_rows: int) -> Dataset:
    """Different questions of `length` tokens, every other one a token shorter, so that batches are padded."""
    texts = ["".join(LETTERS[(i + j * (i // 8 + 1)) % 8] for j in range(length - i % 2)) for i in range(num_rows)]
    return Dataset.from_list([{"prompt": text} for text in texts])


def main(folder: str, main: dict, assistant: dict, policy: dict, args: dict, dtype: str, prompt_length: int) -> None:
    libc = ctypes.CDLL(None)  # freed memory goes back at once, so that what is resident is what is in use
    for option in (-3, -1):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of <malloc.h>
        libc.mallopt(option, 65536)
    dtype = getattr(torch, dtype)
    recorder = GradientRecorder()

    def build(name: str, main: dict, assistant: dict, max_steps: int) -> LatentGRPOTrainer:
        main_model = random_model(tiny_config(**main), dtype)
        backbone = random_model(tiny_config(**assistant)).base_model
        return make_trainer(
            Path(folder) / name,
            reward_funcs=length_reward,
            main_model=main_model,
            model=LatentPolicyModel.from_assistant(backbone, main_model, tiny_tokenizer(), **policy),
            train_dataset=prompts(prompt_length, 64),
            trainer_kwargs={"callbacks": [recorder]},
            **{"num_iterations": 1, "max_steps": max_steps, **args},
        )

    # What is imported or compiled at the first step is no part of the plan
    positions = {"max_position_embeddings": main["max_position_embeddings"]}
    build("before", positions, positions, 1).train()
    recorder.num_bytes = None
    libc.malloc_trim(0)
    before = status("VmRSS")
    recorder.trainer = trainer = build("measured", main, assistant, 2)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the models
    trainer.train()
    measured = {"total": status("VmHWM") - before, **exact_bytes(trainer, recorder)}
    measured["engine"] = type(trainer.model_wrapped).__name__
    trained = trainer.accelerator.unwrap_model(trainer.model)
    num_trainable = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)

    with torch.device("meta"):
        shapes = LatentPolicyModel(trained.config), AutoModelForCausalLM.from_config(tiny_config(**main), dtype=dtype)
    plan = plan_memory(
        *shapes,
        trainer.args,
        prompt_length=prompt_length,
        num_processes=trainer.accelerator.num_processes,
        zero_stage=2 if trainer.is_deepspeed_enabled else 0,
        reduce_bucket_size=num_trainable,  # what is never written to takes no memory on a CPU
        on_gpu=False,
    )
    path = Path(folder) / f"memory_{trainer.accelerator.process_index}.json"
    path.write_text(json.dumps({"measured": measured, "planned": {**vars(plan), "total": plan.total}}))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # as in distributed_worker.py


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
