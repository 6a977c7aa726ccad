"""What the hooks know about a model; kept on it, and no state of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config import CachePolicy, PTEConfig
from ..encoder import ThoughtEncoder


class Attachment:
    """What the hooks know about a model: its parts, and the configurations by adapter name.

    A plain object on the top model and on the decoder (`pte_attachment`), so that its references are no submodules;
    a deepcopy of the model takes a matching copy along.
    """

    def __init__(self, top: nn.Module, decoder: nn.Module):
        self.top, self.decoder = top, decoder
        self.configs: dict[str, PTEConfig] = {}
        self.encoders: list[ThoughtEncoder] = []
        self.handles: list[Any] = []

    def active(self) -> tuple[CachePolicy | None, tuple[str, ...]]:
        """The cache policy of the live adapters, None if PTE is off, and their names.

        Raises:
            ValueError: adapters with different policies are active together.
        """
        names = tuple(dict.fromkeys(name for encoder in self.encoders for name in encoder.live_adapters))
        policies = {name: self.configs[name].cache_policy for name in names}
        if len(set(policies.values())) > 1:
            raise ValueError(
                f"The active adapters want different caches, but there is one for all of them: {policies}. Activate "
                "one at a time with `set_adapter`, or give them the same window_size, eviction_ratio, retained_prefix, "
                "gradient and offload."
            )
        return (policies[names[0]] if names else None), names

    def trains(self) -> bool:
        """Whether this call builds a graph for the adapter's parameters."""
        return torch.is_grad_enabled() and any(p.requires_grad for e in self.encoders for p in e.parameters())
