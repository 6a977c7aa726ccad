"""What a captured step (graph.py) takes for granted about the decoder, and what it cannot be made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

PACKAGE = __name__.partition(".")[0]
# Hooks that do nothing in a step without gradients: transformers', to record outputs and to train embeddings, and ours.
HARMLESS_HOOKS = ("output_capturing_hook", "make_inputs_require_grads", "make_inputs_require_grad")


class Unsupported(Exception):
    """Why a model's step cannot be replayed."""


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
