# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Print versions and machine, for an issue."""

import importlib.metadata
import platform

import torch


PACKAGES = ("trl_dlr", "trl", "transformers", "peft", "accelerate", "datasets", "math-verify", "deepspeed", "torch")
OPTIONAL = ("vllm", "bitsandbytes", "lm_eval", "reasoning-gym")

ARGUMENTS = ()


def main() -> None:
    print(f"{'platform':<16}{platform.platform()}\n{'python':<16}{platform.python_version()}")
    for package in (*PACKAGES, *OPTIONAL):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        print(f"{package:<16}{found}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{'accelerator':<16}{', '.join(devices) or 'none'}")
