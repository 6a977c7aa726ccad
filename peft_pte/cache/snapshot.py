"""What a captured step (graph.py) takes for granted about the decoder, and what it cannot be made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle

PACKAGE = __name__.partition(".")[0]
# Hooks that do nothing in a step without gradients: transformers', to record outputs and to train embeddings, and ours.
HARMLESS_HOOKS = ("output_capturing_hook", "make_inputs_require_grads", "make_inputs_require_grad")


# Operations whose result, or its shape, the host reads back from the device.
SYNCHRONISING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Before, a capture that fails leaves the allocator as if it still went on, and later ones die of an internal assertion
# (pytorch#180395).
SAFE_TO_FAIL = Version("2.12")


class Unsupported(Exception):
    """Why a model's step cannot be replayed."""


class Trial(TorchDispatchMode):
    """Raises `Unsupported` for operations that cannot be captured: a capture that fails is not undone without traces.

    (The private memory pool of an unfinished capture is never given back, pytorch#190308.)
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if not SYNCHRONISING.isdisjoint(function.tags):
            raise Unsupported(f"the host has to wait for the result of `{function}` in the middle of a step")
        result = function(*args, **(kwargs or {}))
        # Tensors without dimensions are scalars, which may stand on the host, where they are read when they are used.
        moves = function.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
        tensors = [x for x in tree_iter((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if len({tensor.device for tensor in tensors if tensor.ndim or moves}) > 1:
            raise Unsupported(f"`{function}` moves data between devices in the middle of a step")
        return result


def refuse_old_torch(device: torch.device) -> None:
    """Raise `Unsupported` where a capture that fails, for whatever reason, would not be survived."""
    if device.type == "cuda" and Version(torch.__version__).release < SAFE_TO_FAIL.release:
        raise Unsupported(
            f"torch {torch.__version__} is older than {SAFE_TO_FAIL}, before which a failing capture breaks it"
        )


class Snapshot:
    """What a graph takes for granted about a decoder: its modules, their hooks and mode, and where their tensors lie.

    It is compared before every step, with hundreds of modules: so whole tables at once.
    """

    def __init__(self, decoder: nn.Module):
        self.decoder, self.is_training = decoder, decoder.training
        modules = list(decoder.modules())
        self.children = [m._modules for m in modules if m._modules]
        self.known_children = [dict(table) for table in self.children]
        self.tensor_tables = [table for m in modules for table in (m._parameters, m._buffers) if table]
        self.tensors = [tensor for tensor in self._entries() if tensor is not None]  # alive: no other gets their ids
        self.ids = list(map(id, self._entries()))
        self.addresses = list(map(torch.Tensor.data_ptr, self.tensors))
        self.hooks = [table for m in modules for table in (m._forward_pre_hooks, m._forward_hooks)]
        self.known_hooks = [dict(table) for table in self.hooks]
        self.next_hook = RemovableHandle.next_id  # grows with every hook that anybody registers

    def _entries(self) -> Iterator[torch.Tensor | None]:
        return itertools.chain.from_iterable(map(dict.values, self.tensor_tables))

    def _has_same_hooks(self) -> bool:
        if self.next_hook != RemovableHandle.next_id:
            if self.hooks != self.known_hooks:
                return False
            self.next_hook = RemovableHandle.next_id
        return True

    def holds(self) -> bool:
        """Whether all is as it was. A hook that was taken off since does not count: ours go with their modules."""
        return (
            self.decoder.training == self.is_training
            and self._has_same_hooks()
            and self.children == self.known_children
            and list(map(id, self._entries())) == self.ids
            and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
        )


def refuse_model(decoder: nn.Module, snapshot: Snapshot, device: torch.device) -> None:
    """Raise `Unsupported` for what a graph of this decoder would get wrong."""
    for tensor in snapshot.tensors:
        if tensor.device != device:
            raise Unsupported(f"the model is spread over {device} and {tensor.device}")
        if is_traceable_wrapper_subclass(tensor) or not tensor.numel():
            raise Unsupported(f"its parameters are sharded or wrapped ({type(tensor).__name__})")
    has_dropout = any("dropout" in name and value for name, value in vars(decoder.config).items())
    for module in decoder.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            ours = getattr(hook, "__module__", "").startswith(f"{PACKAGE}.")
            if not ours and getattr(hook, "__name__", "") not in HARMLESS_HOOKS:
                raise Unsupported(f"a {type(module).__name__} has a forward hook, which a replay would not call")
        drops = has_dropout or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        if module.training and drops:
            raise Unsupported("dropout is active")
