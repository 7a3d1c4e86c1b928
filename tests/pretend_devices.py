# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Several devices on a CPU: tensors that say where they are, and that refuse to meet others, as those of GPUs do."""

from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


aten = torch.ops.aten
MOVING = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class PlacedTensor(torch.Tensor):
    """Values on the CPU, with another device's name. Of the names that torch knows, "lazy" needs no library."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: torch.device):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, values.size(), device=device, **layout)

    def __init__(self, values: torch.Tensor, device: torch.device):
        self.values_on_cpu = values

    def __repr__(self):
        return f"{self.values_on_cpu!r} on {self.device}"

    def tolist(self):
        return self.values_on_cpu.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return calculate(func, args, kwargs or {})


def calculate(func, args, kwargs):
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    placed = {id(tensor.values_on_cpu): tensor for tensor in tensors if isinstance(tensor, PlacedTensor)}
    device = kwargs.get("device")
    if func not in MOVING:
        # A single number of the CPU may meet any tensor, and indices on the CPU are moved
        indices = [] if func not in INDEXING else [t for t in tensors if t is not args[0] and t.device.type == "cpu"]
        numbers = [t for t in tensors if t.ndim == 0 and t.device.type == "cpu"]
        found = {t.device for t in tensors if not any(t is free for free in indices + numbers)}
        if len(found) > 1:
            names = " and ".join(sorted(map(str, found)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {names} ({func}).")
        device = device or next(iter(found), None)
    device = torch.device(device or (tensors[0].device if tensors else "cpu"))

    def unwrap(leaf):
        if isinstance(leaf, PlacedTensor):
            return leaf.values_on_cpu
        is_placed = isinstance(leaf, torch.device) and leaf.type == "lazy"
        return torch.device("cpu") if is_placed else leaf

    def wrap(output):
        if not isinstance(output, torch.Tensor) or device.type != "lazy":
            return output
        return placed.get(id(output)) if id(output) in placed else PlacedTensor(output, device)

    args, kwargs = tree_unflatten(map(unwrap, leaves), spec)
    return tree_map(wrap, func(*args, **kwargs))


class PretendDevices(TorchDispatchMode):
    """While it is entered, tensors can be made on and moved to `"lazy:0"`, `"lazy:1"` and so on, in this thread."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes its values before it moves them
        self.without_autocast = patch("torch.is_autocast_enabled", lambda device_type=None: False)  # unknown to it
        self.without_autocast.start()
        return super().__enter__()

    def __exit__(self, *args):
        self.without_autocast.stop()
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return calculate(func, args, kwargs or {})
