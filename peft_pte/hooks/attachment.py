"""What the hooks know about a model; kept on it, and no state of a call."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..cache.graph import Steps
from ..compiling import decides, uncompiled
from ..config import CachePolicy, PTEConfig
from ..encoder import ThoughtEncoder
from .window import in_effect

# What an encoder's `live_adapters` depends on.
SWITCHES = operator.attrgetter("_disable_adapters", "_active_adapter", "pte_rule")


class Ref:
    """A weak reference to a module, which goes with it into a deepcopy or a pickle.

    Weak, so that what lies on a module makes no circle with it, and `del model` frees the memory at once.
    """

    def __init__(self, target: nn.Module):
        self._ref = weakref.ref(target)

    def __call__(self) -> nn.Module:
        target = self._ref()
        if target is None:
            raise ReferenceError("The model that this part of PTE belonged to has been deleted.")
        return target

    def __deepcopy__(self, memo: dict[int, Any]) -> Ref:
        return Ref(copy.deepcopy(self(), memo))

    def __reduce__(self) -> tuple[type[Ref], tuple[nn.Module]]:
        return Ref, (self(),)


class Attachment:
    """What the hooks know about a model: its parts, and the configurations by adapter name.

    A plain object on the top model and on the decoder (`pte_attachment`), so that its references are no submodules;
    a deepcopy of the model takes a matching copy along.
    """

    def __init__(self, top: nn.Module, decoder: nn.Module):
        self._top, self._decoder = Ref(top), Ref(decoder)
        self.configs: dict[str, PTEConfig] = {}
        self.encoders: list[ThoughtEncoder] = []
        self.handles: list[Any] = []
        self._known: tuple[list[tuple], tuple[str, ...]] = ([], ())
        self.steps = Steps()  # of decoding, captured
        # With output embeddings, labels are tokens; those of a classifier or a reward model are something else.
        embeddings = getattr(top, "get_output_embeddings", None)  # of the instance: the base may be a PeftModel
        self.predicts_tokens = embeddings is not None and embeddings() is not None

    @property
    def top(self) -> nn.Module:
        """The language model that the decoder is part of."""
        return self._top()

    @property
    def decoder(self) -> nn.Module:
        """The module with the layers."""
        return self._decoder()

    @uncompiled
    def active(self) -> tuple[CachePolicy | None, tuple[str, ...]]:
        """The cache policy of the live adapters, in this context (window.py), None if PTE is off, and their names.

        Raises:
            ValueError: adapters with different policies are active together.
        """
        names = self._live_names()
        return self._policy_of(names), names

    @uncompiled
    def resting_policy(self) -> CachePolicy | None:
        """The same of the adapters that would be live if they were not switched off. Raises: as `active`."""
        found = [name for encoder in self.encoders for name in encoder.active_adapters if encoder.has_adapter(name)]
        return self._policy_of(tuple(dict.fromkeys(found)))

    def _policy_of(self, names: tuple[str, ...]) -> CachePolicy | None:
        policies = {name: in_effect(self, self.configs[name].cache_policy) for name in names}
        if len(set(policies.values())) > 1:
            raise ValueError(
                f"The active adapters want different caches, but there is one for all of them: {policies}. Activate "
                "one at a time with `set_adapter`, or give them the same window_size, eviction_ratio, retained_prefix, "
                "gradient and offload."
            )
        return policies[names[0]] if names else None

    def _live_names(self) -> tuple[str, ...]:
        """The live adapters of all encoders; found anew only when what they depend on has changed.

        It is asked for twice a token, and what `live_adapters` computes for a layer takes longer than a comparison.
        """
        now = list(map(SWITCHES, self.encoders))
        known, names = self._known
        if now != known:
            names = tuple(dict.fromkeys(name for encoder in self.encoders for name in encoder.live_adapters))
            self._known = [tuple(map(copy.copy, switches)) for switches in now], names  # lists may change in place
        return names

    def trains(self) -> bool:
        """Whether this call builds a graph for the adapter's parameters."""
        return torch.is_grad_enabled() and any(p.requires_grad for e in self.encoders for p in e.parameters())


class Wrapper:
    """`around(module, original, *args, **kwargs)` in front of a method of one module.

    It lies in the instance's `__dict__`. What was there before (a wrapper of accelerate's, say) is called as
    `original`. If somebody has wrapped it in turn, it cannot be taken off: it then passes everything through as soon as
    the attachment that it belongs to is no longer the module's.
    """

    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any], attachment: Attachment):
        self.module, self.name, self.around, self.attachment = Ref(module), name, around, attachment
        self.previous: Callable[..., Any] | None = module.__dict__.get(name)
        method = getattr(type(module), name)
        self.__name__, self.__qualname__, self.__doc__ = name, method.__qualname__, method.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def original(self) -> Callable[..., Any]:
        """The method without this wrapper."""
        if self.previous is not None:
            return self.previous
        module = self.module()
        return functools.partial(getattr(type(module), self.name), module)

    @decides
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        if module.__dict__.get("pte_attachment") is not self.attachment:
            return self.original(*args, **kwargs)
        return self.around(module, self.original, *args, **kwargs)


def wrap(module: nn.Module, name: str, around: Callable[..., Any], attachment: Attachment) -> None:
    """Put a `Wrapper` in front of `module.<name>`, for this instance only."""
    setattr(module, name, Wrapper(module, name, around, attachment))


def unwrap(module: nn.Module, name: str, attachment: Attachment) -> None:
    """Take the attachment's wrapper off again, unless somebody has wrapped it since."""
    wrapper = module.__dict__.get(name)
    if not isinstance(wrapper, Wrapper) or wrapper.attachment is not attachment:
        return
    if wrapper.previous is None:
        delattr(module, name)
    else:
        setattr(module, name, wrapper.previous)
