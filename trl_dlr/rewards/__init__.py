# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .correctness import answers_agree, correctness_reward, majority_vote
from .extraction import extract_answer
from .format import get_pattern_reward, get_tag_format_reward, tag_format_reward
from .reasoning_gym import get_reasoning_gym_reward


__all__ = [
    "answers_agree",
    "correctness_reward",
    "extract_answer",
    "get_pattern_reward",
    "get_reasoning_gym_reward",
    "get_tag_format_reward",
    "majority_vote",
    "tag_format_reward",
]
