"""What a captured step (graph.py) takes for granted about the decoder, and what it cannot be made of."""

from __future__ import annotations

import copy
import operator
import weakref
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
# Attributes that change from call to call, of modules (ours, and switched around a call) and of configurations.
PASSING = {"traced_call", "gradient_checkpointing", "_gradient_checkpointing_func", "use_cache"}
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

    There are hundreds of modules: so whole tables are compared at once. It does not refer to the decoder itself.
    """

    def __init__(self, decoder: nn.Module):
        self.of, self.is_training = weakref.ref(decoder), decoder.training
        modules = list(decoder.modules())
        self.children = [m._modules for m in modules if m._modules]
        self.known_children = [dict(table) for table in self.children]
        tables = [table for m in modules for table in (m._parameters, m._buffers) if table]
        self.tensor_tables = [table for table in tables if not any(map(is_scalar, table.values()))]
        self.known_tensors = [dict(table) for table in self.tensor_tables]
        # Tensors of one element, which may be equal without being the same.
        self.scalar_tables = [table for table in tables if any(map(is_scalar, table.values()))]
        self.known_scalars = [list(table.values()) for table in self.scalar_tables]
        self.tensors = [tensor for table in tables for tensor in table.values() if tensor is not None]
        self.addresses = list(map(torch.Tensor.data_ptr, self.tensors))
        self.hooks = [table for m in modules for table in (m._forward_pre_hooks, m._forward_hooks)]
        self.known_hooks = [dict(table) for table in self.hooks]
        self.next_hook = RemovableHandle.next_id  # grows with every hook that anybody registers
        self.attributes = [vars(m) for m in modules if m is not decoder]
        self.known_attributes = [lasting(table) for table in self.attributes]
        self.known_settings = settings_of(decoder)
        self.configs = list({id(m.config): m.config for m in modules if hasattr(m, "config")}.values())
        self.known_configs = [lasting(vars(config)) for config in self.configs]

    def _has_same_tensors(self) -> bool:
        try:
            # Dictionaries compare values by identity first. Other tensors have no single truth value, which raises.
            has_same = self.tensor_tables == self.known_tensors
        except Exception:
            return False
        return has_same and all(
            len(table) == len(known) and all(map(operator.is_, table.values(), known))
            for table, known in zip(self.scalar_tables, self.known_scalars)
        )

    def _has_same_hooks(self) -> bool:
        if self.next_hook != RemovableHandle.next_id:
            if self.hooks != self.known_hooks:
                return False
            self.next_hook = RemovableHandle.next_id
        return True

    def seems_to_hold(self) -> bool:
        """Whether mode and hooks are as they were: enough inside of a call that does not change the model."""
        decoder = self.of()
        return decoder is not None and decoder.training == self.is_training and self._has_same_hooks()

    def holds(self) -> bool:
        """Whether all is as it was. A hook that was taken off since does not count: ours go with their modules."""
        return (
            self.seems_to_hold()
            and self.children == self.known_children
            and self._has_same_tensors()
            and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
        )

    def holds_in_detail(self) -> bool:
        """The same for another cache, maybe much later: also attributes, configurations, and hooks that are gone."""
        return (
            self.holds()
            and self.hooks == self.known_hooks
            and settings_of(self.of()) == self.known_settings
            and all(map(is_same, self.attributes, self.known_attributes))
            and all(is_same(vars(config), known) for config, known in zip(self.configs, self.known_configs))
        )


def is_scalar(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.numel() == 1


def lasting(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module or a configuration that do not belong to a call in progress, as they are now."""
    return {
        name: copy.copy(value) if type(value) in (dict, list) else value
        for name, value in attributes.items()
        if name not in PASSING
    }


def is_same(attributes: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether attributes are the same objects as before, or equal plain ones."""
    try:
        return attributes == known or lasting(attributes) == known
    except Exception:  # tensors and arrays, which have no single truth value when they are not the same object
        return False


def settings_of(decoder: nn.Module) -> dict[str, Any]:
    """The plain attributes of the decoder itself; others may refer to it, and a snapshot must not."""
    return {name: x for name, x in lasting(vars(decoder)).items() if isinstance(x, (bool, int, float, str))}


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
