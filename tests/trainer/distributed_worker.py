# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Run by test_distributed.py under a launcher: a few steps from the same global rollouts, whatever the processes."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.experimental.latent_rl.test_latent_rl_trainer import make_trainer as make_latent_rl_trainer
from tests.tiny import random_main_model, tiny_dataset
from tests.trainer.test_coconut_sft_trainer import make_coconut_trainer
from tests.trainer.test_latent_grpo_trainer import history, make_policy, make_trainer
from tests.trainer.test_latent_sft_trainer import make_sft_trainer, with_steps
from tests.trainer.test_soft_token_grpo_trainer import EXACT, undecided_model
from tests.trainer.test_soft_token_grpo_trainer import make_trainer as make_soft_token_trainer


GLOBAL_BATCH, GROUP, PROMPT, STEPS, DIM = 8, 4, 5, 3, 4


def stored_rollout(trainer):
    """The local share of a rollout that is made up, in full and alike, on every process."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    size, rank = GLOBAL_BATCH // trainer.accelerator.num_processes, trainer.accelerator.process_index
    latents = torch.randn(GLOBAL_BATCH, STEPS, DIM, generator=generator)[:, : trainer.num_latents]
    rows = torch.arange(GLOBAL_BATCH)
    everywhere = {
        "prompt_ids": torch.randint(3, 13, (GLOBAL_BATCH // GROUP, PROMPT), generator=generator)[rows // GROUP],
        "prompt_mask": torch.ones(GLOBAL_BATCH, PROMPT, dtype=torch.long),
        "completion_ids": torch.zeros(latents.shape[:2], dtype=torch.long),
        "completion_mask": torch.ones(latents.shape[:2], dtype=torch.long),
        "advantages": torch.randn(GLOBAL_BATCH, generator=generator),
        "latents": latents,
        "lengths": torch.full((GLOBAL_BATCH,), latents.size(1)),
        "old_per_token_logps": -6 + torch.randn(latents.shape[:2], generator=generator) / 10,
        "ref_mean": torch.randn(latents.shape, generator=generator),
        "ref_log_std": torch.zeros(GLOBAL_BATCH, 1, DIM),
        "noise": latents,
        "main_prompt_ids": torch.randint(3, 13, (GLOBAL_BATCH, PROMPT), generator=generator),
        "main_prompt_mask": torch.ones(GLOBAL_BATCH, PROMPT, dtype=torch.long),
        "decoded_ids": torch.randint(3, 13, (GLOBAL_BATCH, 2), generator=generator),
        "group_index": rows // GROUP,
        "member_index": rows % GROUP,
    }
    trainer._groups["train"] = latents.unflatten(0, (-1, GROUP)), latents.unflatten(0, (-1, GROUP))
    local = {name: tensor[rank * size : (rank + 1) * size] for name, tensor in everywhere.items()}
    return {
        **local,
        "num_items_in_batch": torch.tensor(latents[..., 0].numel()),
        "rollout_step": torch.tensor(-1),
        "num_rewarded": torch.tensor(GLOBAL_BATCH * (trainer.state.global_step not in trainer.steps_without_rewards)),
    }


def fail_on(trainer, rank: int, step: int, how: str) -> None:
    """While `step` calls its reward functions, process `rank` raises, is killed, or is told to end."""
    calculate_rewards = trainer._calculate_rewards

    def wrapped(*args, **kwargs):
        if trainer.state.global_step == step and trainer.accelerator.process_index == rank:
            if how == "raise":
                raise ZeroDivisionError(f"process {rank} has failed")
            os.kill(os.getpid(), getattr(signal, how))
        return calculate_rewards(*args, **kwargs)

    trainer._calculate_rewards = wrapped


def end(trainer) -> None:
    """Leave when all have written, past the interpreter's exit: torch's threads have aborted there now and then."""
    trainer.accelerator.wait_for_everyone()
    os._exit(0)


def write(trainer, folder: Path, figures: dict, value_head: torch.nn.Module | None = None) -> None:
    """This process's weights and figures, for the test to read."""
    rank, weights = trainer.accelerator.process_index, trainer.accelerator.unwrap_model(trainer.model).state_dict()
    if value_head is not None:
        weights |= {f"value_head.{name}": tensor for name, tensor in value_head.state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / f"weights_{rank}.safetensors")
    figures |= {"engine": type(trainer.model_wrapped).__name__, "processes": trainer.accelerator.num_processes}
    (folder / f"run_{rank}.json").write_text(json.dumps(figures))


def run_case(folder: Path, mode: str, num_processes: int, **kwargs):
    """Train one trainer, and write what it has become. With `local_disks` each node has a folder of its own."""
    if kwargs.pop("local_disks", False):
        folder = folder / f"node_{os.environ['GROUP_RANK']}"
    folder.mkdir(parents=True, exist_ok=True)
    failure, num_rows = kwargs.pop("failure", None), kwargs.pop("num_rows", 40)
    checkpoint, steps_without_rewards = kwargs.pop("checkpoint", None), kwargs.pop("steps_without_rewards", ())
    batch_size = GLOBAL_BATCH // num_processes
    if mode == "soft_tokens":
        model = undecided_model()
        with torch.no_grad():  # other weights on each process
            model.model.norm.weight += int(os.environ["RANK"])
        batches = {f"per_device_{part}_batch_size": batch_size for part in ("train", "eval")}
        trainer = make_soft_token_trainer(folder, model, **EXACT, **batches, **kwargs)
        trainer.train()
        write(
            trainer,
            folder,
            {key: history(trainer, key) for key in ("kl", "redrawn_groups", "reward", "frac_reward_zero_std")},
        )
        return trainer
    if mode in ("sft", "coconut", "latent_rl"):
        curriculum = {"num_stages": 3, "latents_per_stage": 1, "max_steps": 6, "train_dataset": with_steps(32)}
        curriculum |= {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": 2}
        if mode == "sft":
            policy = make_policy(random_main_model(), **kwargs.pop("policy_kwargs", {}))
            policy.draw_noise = torch.zeros  # which processes draw differently
            trainer = make_sft_trainer(folder, model=policy, **{**curriculum, **kwargs})
        elif mode == "coconut":
            held_out = with_steps(5).map(lambda row: {"answer": row["completion"].removeprefix("=")})
            eval_dataset = {"trainer_kwargs": {"eval_dataset": held_out}}
            trainer = make_coconut_trainer(folder, **curriculum, **eval_dataset, **kwargs)
        else:
            trainer = make_latent_rl_trainer(folder, per_device_train_batch_size=batch_size, **kwargs)
        trainer.train(resume_from_checkpoint=checkpoint)
        figures = {key: history(trainer, key) for key in ("loss", "value/auc", "value/accuracy")}
        if mode == "coconut":
            figures["answers"] = trainer._answer(trainer.eval_dataset)
            figures["accuracy"] = trainer.evaluate()["eval_accuracy"]
        write(trainer, folder, figures, trainer.value_head if mode == "latent_rl" else None)
        return trainer
    policy_kwargs, best_step = {"learn_sigma": True, **kwargs.pop("policy_kwargs", {})}, kwargs.pop("best_step", None)
    if best_step is not None:
        kwargs |= {"eval_strategy": "steps", "eval_steps": kwargs["save_steps"], "metric_for_best_model": "reward"}
        kwargs |= {"load_best_model_at_end": True, "trainer_kwargs": {"eval_dataset": tiny_dataset(4, 1)}}
    if kwargs.pop("own_weights", False):  # random ones, other ones on each process
        policy_kwargs["seed"] = int(os.environ["RANK"])
    trainer = make_trainer(
        folder,
        per_device_train_batch_size=batch_size,
        train_dataset=tiny_dataset(num_rows, 0),
        num_generations=GROUP if mode == "stored" else GLOBAL_BATCH,
        **{"max_steps": 4, "beta": 0.1, "gamma": 0.01, "policy_kwargs": policy_kwargs, **kwargs},
    )
    if failure is not None:
        fail_on(trainer, **failure)
    (folder / f"started_{trainer.accelerator.process_index}").write_text(str(os.getpid()))
    trainer.steps_without_rewards = steps_without_rewards
    if best_step is not None:
        trainer.evaluate = lambda **kwargs: {"eval_reward": float(trainer.state.global_step == best_step)}
    if mode == "stored":
        trainer._generate_and_score_completions = lambda inputs: stored_rollout(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    figures = {"decoded": trainer.engine.num_decoded, "micro_steps": trainer._step}
    if trainer.is_deepspeed_enabled:
        figures["stage"] = trainer.model_wrapped.zero_optimization_stage()
        partitions = trainer.model_wrapped.optimizer.single_partition_of_fp32_groups
        figures["partition"] = sum(partition.numel() for partition in partitions)
        figures["trainable"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    keys = ["reward", "frac_reward_mixed", "latent/kl", "latent/diversity", "main_model/decoded_fraction", "loss"]
    keys += [
        "grad_norm",
        "skipped_steps",
        "prescreening/loss",
        "prescreening/reward_random",
        "completions/mean_length",
    ]
    figures |= {key: history(trainer, key) for key in keys}
    write(trainer, folder, figures, None if trainer.prescreener is None else trainer.prescreener.head)
    return trainer


def main(folder: str, mode: str, num_processes: int, cases: dict | None = None, **kwargs):
    """One case, or several by name, each in a folder of its own: a launch takes longer than what it is for."""
    for name, (mode_of_case, settings) in (cases or {"": (mode, kwargs)}).items():
        trainer = run_case(Path(folder) / name, mode_of_case, num_processes, **settings)
    end(trainer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
