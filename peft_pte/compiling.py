"""`torch.compile` of a whole model: what decides runs as Python, and the forward of each segment is one graph.

The number of segments, their borders and what leaves the cache depend on the data, so the compiler could follow the
loops over segments only by breaking its graph at every decision, and would compile every segment anew.
"""

from __future__ import annotations

import torch

# A function that calls the model's own forward: its frame is Python, what it calls may be compiled.
decides = torch.compiler.disable(recursive=False)
# A function that calls nothing that is worth compiling.
uncompiled = torch.compiler.disable
