# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .controls import answer_questions, evaluate_latents, score_answers
from .metrics import majority_at_k, mean_interval, pass_at_k, wilson_interval
from .preflight import preflight


__all__ = [
    "answer_questions",
    "evaluate_latents",
    "majority_at_k",
    "mean_interval",
    "pass_at_k",
    "preflight",
    "score_answers",
    "wilson_interval",
]
