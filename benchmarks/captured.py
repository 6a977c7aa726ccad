"""Forward and backward of a training step as CUDA graphs: small kernels in their thousands, launched at once.

Under the window a step is many short segments, and on a fast GPU it is the host that they wait for. Streams of one
length have one layout, so that a graph made of one batch serves for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

LossOf = Callable[[torch.Tensor], torch.Tensor]  # tokens [N, T] -> mean loss


class Captured(NamedTuple):
    """A graph with the tensors that it reads and writes; a replay writes the gradients anew."""

    graph: torch.cuda.CUDAGraph
    input_ids: torch.Tensor
    loss: torch.Tensor
    gradients: list[torch.Tensor | None]
    loss_of: LossOf  # whose tensors it reads, too


class CapturedSteps:
    """Loss and gradients of batches; one graph for each length, all in one pool of memory."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.parameters = parameters
        self.by_length: dict[int, Captured] = {}

    def __call__(self, input_ids: torch.Tensor, loss_of: LossOf) -> torch.Tensor:
        """The loss of tokens [N, T], whose gradients are in the parameters. `loss_of`: the same for all of a length."""
        length = input_ids.shape[1]
        if length not in self.by_length:
            self.by_length[length] = self.capture(input_ids, loss_of)
        captured = self.by_length[length]
        captured.input_ids.copy_(input_ids)
        captured.graph.replay()
        for parameter, gradient in zip(self.parameters, captured.gradients):
            parameter.grad = gradient
        return captured.loss

    def forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def capture(self, input_ids: torch.Tensor, loss_of: LossOf) -> Captured:
        # What is compiled, measured or allocated on first use is so before, on another stream than the usual one.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            input_ids = input_ids.clone()
            for _ in range(1 if self.by_length else 2):
                self.forget_gradients()
                loss_of(input_ids).backward()
        torch.cuda.current_stream().wait_stream(side)
        self.forget_gradients()
        torch.cuda.empty_cache()  # the pool of the graphs gets this memory
        first = next(iter(self.by_length.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=first and first.graph.pool()):
            loss = loss_of(input_ids)
            loss.backward()
            loss = loss.detach()
        return Captured(graph, input_ids, loss, [parameter.grad for parameter in self.parameters], loss_of)
