# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Run by test_thinking_distributed.py under a launcher: a model that thinks by itself, on the same global batches."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny import tiny_dataset
from tests.trainer.distributed_worker import end
from tests.trainer.test_latent_grpo_trainer import history
from tests.trainer.test_soft_token_grpo_trainer import METHODS, make_trainer


GLOBAL_BATCH, PROMPT, LATENTS, CANDIDATES, ANSWER = 8, 4, 3, 6, 2


def stored_rollout(trainer):
    """The local share of a rollout that is made up, in full and alike, on every process."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    size, rank = GLOBAL_BATCH // trainer.accelerator.num_processes, trainer.accelerator.process_index
    lengths = 1 + torch.arange(GLOBAL_BATCH) % LATENTS
    mask = (torch.arange(LATENTS + ANSWER) < lengths.unsqueeze(1) + ANSWER).long()

    def ids(*shape):
        return torch.randint(3, 25, (GLOBAL_BATCH, *shape), generator=generator)

    everywhere = {
        "prompt_ids": ids(PROMPT),
        "prompt_mask": torch.ones(GLOBAL_BATCH, PROMPT, dtype=torch.long),
        "completion_ids": ids(LATENTS + ANSWER),
        "completion_mask": mask,
        "tool_mask": torch.ones_like(mask),
        "advantages": torch.randn(GLOBAL_BATCH, generator=generator),
        "latent_token_ids": ids(LATENTS, CANDIDATES),
        "latent_perturbed": torch.randn(GLOBAL_BATCH, LATENTS, CANDIDATES, generator=generator),
        "latent_states": torch.randn(GLOBAL_BATCH, LATENTS, 64, generator=generator),
        "latent_lengths": lengths,
    }
    stored = {"states"} if trainer.args.latent_type == "hidden_states" else {"token_ids", "perturbed"}
    for name in {"token_ids", "perturbed", "states"} - stored:
        del everywhere[f"latent_{name}"]
    local = {name: tensor[rank * size : (rank + 1) * size] for name, tensor in everywhere.items()}
    step = torch.tensor(trainer.state.global_step)
    return {**local, "num_items_in_batch": mask.sum(), "rollout_step": step}


def main(folder: str, mode: str, num_processes: int, **kwargs):
    folder, batch_size = Path(folder), GLOBAL_BATCH // num_processes
    kwargs = {**METHODS[mode], "first_latent_selection": False, "num_iterations": 1, **kwargs}
    trainer = make_trainer(
        folder,
        train_dataset=tiny_dataset(40, 0),
        num_generations=GLOBAL_BATCH,
        per_device_train_batch_size=batch_size,
        **kwargs,
    )
    trainer._generate_and_score_completions = lambda inputs: stored_rollout(trainer)
    trainer.train()
    rank, weights = trainer.accelerator.process_index, trainer.accelerator.unwrap_model(trainer.model).state_dict()
    weights = {name: tensor.clone() for name, tensor in weights.items() if name != "lm_head.weight"}  # may be tied
    save_file(weights, folder / f"weights_{rank}.safetensors")
    figures = {"loss": history(trainer, "loss"), "engine": type(trainer.model_wrapped).__name__}
    (folder / f"run_{rank}.json").write_text(json.dumps(figures))
    trainer.save_model()
    end(trainer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
