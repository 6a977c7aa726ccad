"""`torch.compile` of a whole model: what decides runs as Python, and the forward of each segment is one graph.

The number of segments, their borders and what leaves the cache depend on the data, so the compiler could follow the
loops over segments only by breaking its graph at every decision, and would compile every segment anew.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

# A function that calls the model's own forward: its frame is Python, what it calls may be compiled.
decides = torch.compiler.disable(recursive=False)
# A function that calls nothing that is worth compiling.
uncompiled = torch.compiler.disable


def has_compiled_layers(decoder: nn.Module) -> bool:
    """Whether `layer.compile()` was called for some of them."""
    return any(layer._compiled_call_impl is not None for layer in decoder.layers)


def layers_uncompiled(decoder: nn.Module) -> AbstractContextManager[None]:
    """Run such layers as they are: steps with a cache, whose length is a constant to the compiler.

    They would be compiled anew at each step and for each layer until no more is compiled, segments neither.
    """
    return torch.compiler.set_stance("force_eager") if has_compiled_layers(decoder) else nullcontext()
