# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .correctness import correctness_reward, extract_answer
from .format import get_pattern_reward, get_tag_format_reward, tag_format_reward


__all__ = [
    "correctness_reward",
    "extract_answer",
    "get_pattern_reward",
    "get_tag_format_reward",
    "tag_format_reward",
]
