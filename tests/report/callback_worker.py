# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Run by test_report_callback.py under a launcher: a few steps with or without a report, and the weights they end with.
"""

import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.tiny import tiny_dataset
from tests.trainer.test_latent_grpo_trainer import length_reward, make_trainer, weights
from trl_dlr import LatentReportCallback


def main(folder: str, has_report: str) -> None:
    trainer = make_trainer(Path(folder), max_steps=4, per_device_train_batch_size=4)
    if has_report == "with":
        settings = {"num_questions": 2, "num_samples": 2, "report_steps": 2, "probe_during_training": True}
        trainer.add_callback(LatentReportCallback(trainer, tiny_dataset(2, 1), length_reward, **settings))
    trainer.train()
    if trainer.accelerator.is_main_process:
        save_file(weights(trainer.policy), Path(folder) / "weights.safetensors")
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # past the interpreter's exit: torch's threads have aborted there now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
