# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A plugin of pytest, `-p tests.gpu.on_gpu`: trainers that tests build for a CPU run on the GPU."""

from transformers import TrainingArguments


post_init = TrainingArguments.__post_init__


def post_init_on_gpu(self: TrainingArguments) -> None:
    self.use_cpu = False
    post_init(self)


TrainingArguments.__post_init__ = post_init_on_gpu
