"""A second decoder of the same tensors, on which a step (step.py) runs with settings of its own.

The step needs another attention function than the one that the model's configuration names, and puts states into its
projections. On the model itself, other threads that use it at the same time would see both.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedConfig

from .snapshot import Unsupported

# What PTE keeps on a decoder, and the forward that it has wrapped: a twin has its class's own.
OURS = "pte_"
# Set by `module.compile()`, and bound to the module. A twin is not compiled: what it calls is captured anyway.
COMPILED = "_compiled_call_impl"


def twin_of(decoder: nn.Module, attention: str) -> nn.Module:
    """A copy of the module tree that shares parameters and buffers, with `attention` as its attention implementation.

    Every module has a table of attributes of its own, so that nothing that is set on the twin, a hook neither, is seen
    on the original. What refers to a module of the tree, in an attribute or in a list of an attribute, refers to its
    twin instead. Nothing in the twin refers to the original decoder.

    Raises:
        Unsupported: a module's forward was replaced by something that cannot be moved to its twin.
    """
    twins = {module: module.__class__.__new__(module.__class__) for module in decoder.modules()}
    configs: dict[int, PreTrainedConfig] = {}

    def moved(value: Any) -> Any:
        """What stands for an attribute's value in the twin; the value itself where it can be shared."""
        if isinstance(value, nn.Module):
            return twins.get(value, value)
        if isinstance(value, PreTrainedConfig):
            if id(value) not in configs:
                configs[id(value)] = twin = copy.copy(value)
                vars(twin).update({name: moved(inner) for name, inner in vars(value).items()})
            return configs[id(value)]
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, moved(value.__self__))
        if type(value) in (list, tuple, set):
            items = [moved(item) for item in value]
            return value if all(a is b for a, b in zip(items, value)) else type(value)(items)
        if type(value) is dict:
            table = {key: moved(item) for key, item in value.items()}
            return value if all(table[key] is value[key] for key in value) else table
        return value

    for module, twin in twins.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise Unsupported(f"a {type(module).__name__} is a TorchScript module")
        for name, value in list(vars(module).items()):
            is_ours = module is decoder and (name == "forward" or name.startswith(OURS))
            if is_ours or name == COMPILED:
                continue
            if name in ("_parameters", "_buffers"):
                own = value
            elif name == "_modules":
                own = {child: twins.get(inner) for child, inner in value.items()}
            elif "_hooks" in name and isinstance(value, dict):
                own = copy.copy(value)
            else:
                own = moved(value)
                if name == "forward" and not is_own_method(value, module):
                    raise Unsupported(f"the forward of a {type(module).__name__} was replaced")
            vars(twin)[name] = own
        if hasattr(twin, "gradient_checkpointing"):  # it drops the cache; and others may be switching it
            twin.gradient_checkpointing = False
    for config in configs.values():
        config._attn_implementation = attention
    return twins[decoder]


def is_own_method(forward: Any, module: nn.Module) -> TypeGuard[types.MethodType]:
    return isinstance(forward, types.MethodType) and forward.__self__ is module


def refuse_wrapper(decoder: nn.Module, original: Callable[..., Any]) -> None:
    """Raise `Unsupported` unless `original`, the decoder's forward as PTE has found it, is that of its class.

    Somebody's wrapper is bound to the decoder and would not call its twin.
    """
    own = isinstance(original, functools.partial) and original.func is type(decoder).forward
    if not own and not (is_own_method(original, decoder) and original.__func__ is type(decoder).forward):
        raise Unsupported(f"the forward of the {type(decoder).__name__} was replaced before the adapter was attached")
