# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import os


if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: one thread each, in the processes they start too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import tempfile

import pytest
import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_configure(config):
    if "TRAINED_MODELS" not in os.environ:  # of this session: xdist's workers inherit it
        folder = tempfile.TemporaryDirectory()
        os.environ["TRAINED_MODELS"] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_finish(session):
    # Training ends with a garbage collection, which would go through all that was imported, in 0.4 s each time
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    # Each thread of a server in the test's process would start a team of its own
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
