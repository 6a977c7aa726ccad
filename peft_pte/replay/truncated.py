"""Truncated gradients in constant memory: `gradient="truncated"` behind an ordinary `loss.backward()`.

With cached keys and values constant at evictions, the segments between two evictions (a group) depend on earlier ones
only through the cores, one [B, r, r] a layer. So nothing of the forward is kept. The backward pass goes over the
sequence a second time, in the order of time, and takes each group's gradients as soon as the group is computed: those
of the parameters, and those of the cores it read. Then the chain of cores is walked backwards. It needs what was
evicted, the cores, and their gradients, which have waited in host memory; the device holds one group at a time.

Gradients are the same as those of detaching keys and values at every eviction under ordinary autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..cache.schedule import Segment
from ..layer import is_sharded_tensor
from ..stacked import StackedEncoders, encoders_of, stack_encoders
from .heads import Scoring
from .segments import Gone, LayerPast, Stored


class Run(Protocol):
    """What is asked of a forward that is computed segment by segment; `replay.Replay` is one."""

    decoder: nn.Module
    scoring: Scoring | None
    inputs: dict[str, torch.Tensor]
    positions: torch.Tensor

    def new_past(self) -> list[LayerPast]: ...

    def groups(self) -> Iterator[list[Segment]]: ...

    def take_evicted(self, past: list[LayerPast], segment: Segment) -> Gone: ...

    def run(
        self,
        segment: Segment,
        past: list[LayerPast],
        gone: Gone | None,
        stacks: list[StackedEncoders] | None,
        checkpointed: bool,
        embeds: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPast: ...

    def run_all(self, truncated: bool, checkpointed: bool, offload: bool = False) -> list[BaseModelOutputWithPast]: ...


def is_sharded(parameters: list[nn.Parameter]) -> bool:
    """Whether parameters are gathered on demand (FSDP, ZeRO-3), which only ordinary autograd can do."""
    return any(map(is_sharded_tensor, parameters))


def results_of(output: BaseModelOutputWithPast, of_head: bool) -> list[torch.Tensor]:
    """The tensors of a segment that a loss may depend on, each [B, q, ...]; with a head: log-probabilities, entropy."""
    return list(output.hidden_states) if of_head else [output.last_hidden_state, *(output.hidden_states or ())]


class Total:
    """Sums of gradients by tensor."""

    def __init__(self) -> None:
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}

    def add(
        self,
        outputs: list[torch.Tensor],
        gradients: list[torch.Tensor | None],
        tensors: list[torch.Tensor],
        others: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Backpropagate; the gradients of `others` are returned (zero where there is none) and not summed."""
        # The loss does not depend on all outputs, nor do all of them (embeddings, say) on something that is trained.
        used = [(x, gradient) for x, gradient in zip(outputs, gradients) if gradient is not None and x.requires_grad]
        if not used:
            return [torch.zeros_like(x) for x in others]
        roots, root_gradients = zip(*used)
        # Outside of the forward's autocast, as `loss.backward()` is, which would round the products of a backward pass.
        with torch.autocast(roots[0].device.type, enabled=False):
            found = torch.autograd.grad(roots, [*tensors, *others], root_gradients, allow_unused=True)
        for tensor, gradient in zip(tensors, found):
            if gradient is not None:
                self.gradients[tensor] = self.gradients[tensor] + gradient if tensor in self.gradients else gradient
        rest = found[len(tensors) :]
        return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(others, rest)]


class Chain:
    """The cores of all layers from eviction to eviction, computed without a graph, and their gradients.

    Equivalent to `ThoughtEncoder.advance` under autograd. Encoders are used here and not in the attention modules'
    hooks, which is why sharded parameters are left to ordinary autograd.
    """

    def __init__(self, stacks: list[StackedEncoders], batch_size: int):
        self.stacks, self.batch_size = stacks, batch_size
        self.cores: list[Stored] | None = None  # of each stack, in the latest group
        self.steps: list[tuple[Gone | None, list[Stored] | None]] = []  # what each group's cores were made of
        self.wanted: list[list[Stored]] = []  # the gradients of each group's cores

    def advance(self, number: int, cores: torch.Tensor | None, gone: Gone | None) -> torch.Tensor:
        """The cores of one stack, as they are computed before a segment."""
        stack = self.stacks[number]
        evicted = None if gone is None else gone.of_layers(stack.indices)
        return stack.advance(cores, evicted, self.batch_size)

    def step(self, past: list[LayerPast], gone: Gone | None) -> list[torch.Tensor]:
        """Carry the cores of the past on, as leaves of a new graph, which are returned."""
        old, leaves = self.cores, []
        for number, stack in enumerate(self.stacks):
            with torch.no_grad():
                new = self.advance(number, None if old is None else old[number].load(), gone)
            leaves.append(new.detach().requires_grad_())
            with torch.enable_grad():
                for index, core in zip(stack.indices, leaves[-1]):
                    past[index].cores[stack.name] = Stored(core)
        self.cores = [Stored(leaf.detach()) for leaf in leaves]
        self.steps.append((gone, old))
        return leaves

    def finish_step(self, gradients: list[torch.Tensor]) -> None:
        """Note the gradients of the cores that `step` has returned, and move to host memory what waits."""
        self.wanted.append([Stored(gradient) for gradient in gradients])
        gone, old = self.steps[-1]
        for waiting in (*(old or ()), *self.wanted[-1], *(() if gone is None else (gone,))):
            waiting.to_host()

    def backward(self, total: Total) -> None:
        """Walk the chain backwards."""
        carried: list[torch.Tensor | int] = [0] * len(self.stacks)
        for (gone, old), wanted in zip(reversed(self.steps), reversed(self.wanted)):
            for number, stack in enumerate(self.stacks):
                with torch.enable_grad():
                    leaf = None if old is None else old[number].load().detach().requires_grad_()
                    new = self.advance(number, leaf, gone)
                if new.requires_grad:  # else they have just started, as constants
                    gradient = wanted[number].load() + carried[number]
                    leaves = [] if leaf is None else [leaf]
                    found = total.add([new], [gradient], stack.reading_and_parameters(), leaves)
                    carried[number] = found[0] if found else 0


class Surroundings:
    """The autocast and random state of the forward, for the second pass."""

    def __init__(self, x: torch.Tensor):
        self.device_types = {x.device.type, "cpu"}
        self.autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in self.device_types
        }
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(x)

    @contextlib.contextmanager
    def autocast_as_before(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                # No cache: casts that were made without a graph must not be used where one is needed.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self.devices), self.autocast_as_before():
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.device_states)
            yield


class TruncatedReplay(torch.autograd.Function):
    """`run` as one function of its input embeddings, if that is what its inputs are, and of parameters."""

    @staticmethod
    def forward(ctx: Any, run: Run, embeds: torch.Tensor | None, *parameters: nn.Parameter) -> tuple[torch.Tensor, ...]:
        """The joined results of all segments, each [B, T', ...] in the layout's columns; last, the first column of the
        hidden states, [B, 1, D]."""
        ctx.run, ctx.adapters = run, adapters_of(run)
        ctx.save_for_backward(*parameters)  # also checks that they are not changed in between
        ctx.surroundings = Surroundings(run.positions)
        with ctx.surroundings.autocast_as_before():
            outputs = run.run_all(truncated=True, checkpointed=False)
        of_head = run.scoring is not None
        results = [torch.cat(parts, dim=1) for parts in zip(*(results_of(output, of_head) for output in outputs))]
        first_column = outputs[0].last_hidden_state[:, :1].clone()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(first_column, *(results[1:] if of_head else ()))  # the entropy
        return *results, first_column

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        run, parameters = ctx.run, list(ctx.saved_tensors)
        if adapters_of(run) != ctx.adapters:
            raise RuntimeError(
                f"The active adapters were {ctx.adapters} in the forward pass and are {adapters_of(run)} in the "
                "backward pass: with `gradient='truncated'` call `backward` before they are changed."
            )
        of_head = run.scoring is not None
        wanted = gradients[:1] if of_head else gradients[:-1]
        total, embeds_gradients = Total(), []
        is_wanted = columns_of(wanted, run.positions.shape[1])
        with ctx.surroundings.restored():
            past = run.new_past()
            with torch.enable_grad():
                stacks = stack_encoders(run.decoder)
            leaves = [stack.as_leaves() for stack in stacks]
            readings = [x for stack in leaves for x in stack.reading if x.requires_grad]
            chain = Chain(leaves, run.positions.shape[0])
            for group in run.groups():
                columns = slice(group[0].start, group[-1].end)
                sizes = [segment.end - segment.start for segment in group]
                own = [None if gradient is None else gradient[:, columns] for gradient in wanted]
                gone = run.take_evicted(past, group[0]) if group[0].evict else None
                cores = chain.step(past, gone)
                needed = any(is_wanted[columns])
                others, embeds = list(cores), None
                if ctx.needs_input_grad[1]:
                    embeds = run.inputs["inputs_embeds"][:, columns].detach().requires_grad_()
                    others.append(embeds)
                with torch.set_grad_enabled(needed):
                    inputs = repeat(None) if embeds is None else embeds.split(sizes, dim=1)
                    outputs = [
                        run.run(segment, past, None, leaves, needed and len(group) > 1, part)
                        for segment, part in zip(group, inputs)
                    ]
                    results = zip(*(results_of(output, of_head)[: len(own)] for output in outputs))
                    joined = [torch.cat(parts, dim=1) for parts in results]
                tensors = [*parameters, *readings]
                found = total.add(joined, own, tensors, others) if needed else [torch.zeros_like(x) for x in others]
                del inputs, outputs, results, joined  # the graph, and with it all activations of the group
                for layer in past:
                    layer.detach()
                chain.finish_step(found[: len(cores)])
                embeds_gradients.extend(found[len(cores) :])
            chain.backward(total)
            # What has come together at Q and S_0, of all groups, goes on to what they were computed from.
            roots = [x for stack in stacks for x in stack.reading if x.requires_grad]
            total.add(roots, [total.gradients.get(leaf) for leaf in readings], parameters, [])
        return (
            None,
            torch.cat(embeds_gradients, dim=1) if embeds_gradients else None,
            *map(total.gradients.get, parameters),
        )


def columns_of(gradients: Sequence[torch.Tensor | None], length: int) -> list[bool]:
    """In which of so many columns any gradient [B, length, ...] is not zero, found out in one go for all segments."""
    found = [x.any(dim=(0, *range(2, x.ndim))) for x in gradients if x is not None]
    return torch.stack([x.to(found[0].device) for x in found]).any(0).tolist() if found else [False] * length


def adapters_of(run: Run) -> list[tuple[str, ...]]:
    """The live adapters of each layer."""
    return [tuple(encoder.live_adapters) for _, encoder in encoders_of(run.decoder)]
