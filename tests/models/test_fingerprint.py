# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import copy
import itertools
import warnings

import pytest
import torch

from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr import LatentPolicyModel, fresh_layers
from trl_dlr.models import weights_fingerprint
from trl_dlr.models.main_model import fingerprints_match, warn_of_cast


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("saved_in", DTYPES)
def test_loads_of_a_checkpoint_agree_whatever_the_dtype(saved_in):
    saved = random_main_model().to(saved_in)
    saved.model.norm.weight.data[:3] = torch.tensor([1e-5, 1e-7, 1e5])  # beyond what float16 can tell apart
    loads = {dtype: weights_fingerprint(copy.deepcopy(saved).to(dtype)) for dtype in DTYPES}
    for first, second in itertools.combinations(DTYPES, 2):
        # What a float32 checkpoint has lost in one is in the other
        is_lost = saved_in == torch.float32 not in (first, second)
        assert fingerprints_match(loads[first], loads[second]) != is_lost, (first, second)


def test_any_changed_tensor_is_seen():
    fingerprint = weights_fingerprint(random_main_model())
    for name in dict(random_main_model().named_parameters()):
        changed = random_main_model()
        with torch.no_grad():
            changed.get_parameter(name).mul_(1.1)
        for dtype in DTYPES:
            assert not fingerprints_match(fingerprint, weights_fingerprint(changed.to(dtype))), name


def test_a_fingerprint_of_an_earlier_version_is_compared_by_what_it_has():
    fingerprint = weights_fingerprint(random_main_model())
    earlier = fingerprint.rsplit("-", 2)[0]
    assert fingerprints_match(earlier, fingerprint) and fingerprints_match(fingerprint, earlier)
    assert not fingerprints_match(earlier, weights_fingerprint(random_main_model(1)))


def test_a_model_that_was_cast_as_a_whole_is_warned_of(tmp_path):
    random_main_model().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_cast(random_main_model())
        loaded = type(random_main_model()).from_pretrained(tmp_path, dtype=torch.bfloat16)
        warn_of_cast(loaded)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.warns(UserWarning, match=r"rotary embeddings \(model.rotary_emb.inv_freq\) with it"):
            warn_of_cast(random_main_model().to(dtype))


def test_a_policy_warns_of_a_main_model_that_was_cast():
    cast = random_main_model().to(torch.bfloat16)
    assistant = fresh_layers(random_main_model(), 1)
    with pytest.warns(UserWarning, match="`main_model` was cast to bfloat16"):
        policy = LatentPolicyModel.from_assistant(assistant, cast, tiny_tokenizer())
    with pytest.warns(UserWarning, match="`main_model` was cast to bfloat16"):
        policy.attach_main_model(cast)


def test_a_quantized_load_is_compared_by_what_quantization_leaves_alone():
    assert fingerprints_match("aa-bb", "aa-quantized")
    assert not fingerprints_match("aa-bb", "cc-quantized")
    assert not fingerprints_match("aa-bb", "aa-cc")
