# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import torch

from tests.tiny import random_main_model
from trl_dlr.models import weights_fingerprint
from trl_dlr.models.fingerprint import fingerprints_match


def test_same_weights_agree_across_dtypes_and_any_changed_tensor_is_seen():
    fingerprint = weights_fingerprint(random_main_model())
    assert fingerprint == weights_fingerprint(random_main_model().bfloat16())
    for name in dict(random_main_model().named_parameters()):
        changed = random_main_model()
        with torch.no_grad():
            changed.get_parameter(name).mul_(1.1)
        assert not fingerprints_match(fingerprint, weights_fingerprint(changed)), name


def test_a_quantized_load_is_compared_by_what_quantization_leaves_alone():
    assert fingerprints_match("aa-bb", "aa-quantized")
    assert not fingerprints_match("aa-bb", "cc-quantized")
    assert not fingerprints_match("aa-bb", "aa-cc")
