"""The teacher-forced forward of the cache-constrained policy (Eq. 1): a whole sequence, segment by segment.

It computes what token-by-token decoding under a `PTECache` computes, with autograd through cached keys and values and
through the chain of states. `Replay.run` is the one place where a segment meets its past.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..cache.schedule import Schedule, Segment, stored_columns
from ..compiling import decides, has_compiled_layers, uncompiled
from ..config import CachePolicy
from ..host import CACHE_NAMES, DecoderOutput
from ..stacked import StackedEncoders, has_gathered_encoders, stack_encoders
from .checkpointing import checkpoints_layers
from .chunks import num_chunks
from .heads import Scoring, TaskOf, as_output
from .layout import Layout
from .segments import (
    Gone,
    LayerPast,
    Stored,
    current_watch,
    embedded_rows,
    run_checkpointed,
    run_segment,
)
from .transfer import TransferHead
from .truncated import TruncatedReplay, is_sharded

# Where segments are recomputed, the first one (prompt and window) is computed in pieces of the later segments' length,
# so that the peak does not depend on it; but not in pieces shorter than this.
SHORTEST_PIECE = 128


@dataclass
class Replay:
    """Everything that the segments of one forward share, all of it in the layout's columns."""

    decoder: nn.Module
    forward: Callable[..., BaseModelOutputWithPast]
    scoring: Scoring | None  # None: hidden states are what is wanted
    layout: Layout
    schedule: Schedule
    longest: int | None  # segments are split further, so that none is longer
    inputs: dict[str, torch.Tensor]  # `{"input_ids": [B, T']}` or `{"inputs_embeds": [B, T', D]}`
    positions: torch.Tensor  # [B, T']
    mask: torch.Tensor | None  # [B, T'], None: no padding
    kwargs: dict[str, Any]

    def segments(self) -> Iterator[Segment]:
        return self.schedule.segments(self.layout.prefix, self.layout.valid.shape[1], self.longest)

    def groups(self) -> Iterator[list[Segment]]:
        """The segments between one eviction and the next, which share their state."""
        for _, group in groupby(self.segments(), key=lambda segment: segment.num_evicted):
            yield list(group)

    def new_past(self) -> list[LayerPast]:
        compiled = has_compiled_layers(self.decoder)
        return [LayerPast(copies=compiled) for _ in range(self.decoder.config.num_hidden_layers)]

    @uncompiled
    def take_evicted(self, past: list[LayerPast], segment: Segment) -> Gone:
        """What leaves before the segment, removed from the past."""
        end = self.layout.prefix + segment.num_evicted
        columns = slice(end - self.schedule.num_evicted, end)
        pieces = [layer.take(self.schedule.num_evicted) for layer in past]
        valid = None if self.mask is None else self.mask[:, columns]
        return Gone(pieces, self.decoder.rotary_emb, self.positions[:, columns], valid)

    @decides
    def run(
        self,
        segment: Segment,
        past: list[LayerPast],
        gone: Gone | None,
        stacks: list[StackedEncoders] | None,
        checkpointed: bool,
        embeds: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Compute one segment and add it to the past. `gone` is encoded first; `embeds` replaces its input.

        `stacks`: what encodes and reads for all layers together; None: each layer on its own.
        """
        start, end = segment.start, segment.end
        mask, prefix = self.mask, self.layout.prefix
        if mask is not None:
            mask = stored_columns(mask, prefix, segment.num_evicted, end).long()
        inputs = {name: tensor[:, start:end] if embeds is None else embeds for name, tensor in self.inputs.items()}
        kwargs = dict(
            self.kwargs,
            **inputs,
            attention_mask=mask,
            position_ids=self.positions[:, start:end],
        )
        head, forward = None, self.forward
        if self.scoring is not None:
            head = self.scoring.of_segment(start, end)
            if isinstance(self.scoring.head, TransferHead):
                forward, head = self.scoring.head.alone(self.decoder, forward, **self.scoring.about(start, end))
        seen = [(layer.prefix + layer.thoughts, layer.cores) for layer in past]
        run = run_checkpointed if checkpointed else run_segment
        output, new, cores = run(self.decoder, forward, head, seen, gone, stacks, start, kwargs)
        for layer, (keys, values), new_cores in zip(past, new, cores):
            layer.add(keys, values, start, prefix, self.schedule.num_evicted)
            layer.cores = {name: Stored(core) for name, core in new_cores.items()}
        return output

    @decides
    def run_all(self, truncated: bool, checkpointed: bool, offload: bool = False) -> list[BaseModelOutputWithPast]:
        """All segments, with ordinary autograd.

        `truncated`: cached keys and values become constants at each eviction. `offload`: what no later segment reads is
        moved to host memory, from where a recomputed segment gets it.
        """
        past, outputs = self.new_past(), []
        # Q and S_0 once for all segments. Recomputed segments find them among their arguments.
        stacks = None if has_gathered_encoders(self.decoder) else stack_encoders(self.decoder)
        missing = self.agree()
        for segment in self.segments():
            if truncated and segment.evict:
                for layer in past:
                    layer.detach()
            gone = self.take_evicted(past, segment) if segment.evict else None
            old_cores = [core for layer in past for core in layer.cores.values()]
            outputs.append(self.run(segment, past, gone, stacks, checkpointed))
            if offload:
                for core in old_cores:
                    core.to_host()
                if gone is not None:
                    gone.to_host()
        for _ in range(missing):
            zero, first = self.idle(checkpointed), outputs[0]
            if self.scoring is None:
                first.last_hidden_state = first.last_hidden_state + zero
            else:
                differentiable, other = first.hidden_states
                first.hidden_states = (differentiable + zero, other)
        return outputs

    def agree(self) -> int:
        """How many segments more than here the longest sequence of all processes has, if parameters are sharded.

        They are gathered in every segment by all processes together, so that all need the same number of segments, and
        the same number of calls of the head in each.
        """
        lengths = [segment.end - segment.start for segment in self.segments()]
        chunks = num_chunks(self.positions.shape[0], max(lengths)) if self.scoring is not None else 0
        most = agreed_maximum(self.decoder, [len(lengths), chunks], self.positions.device)
        if most is None:
            return 0
        if self.scoring is not None:
            self.scoring.head = functools.partial(self.scoring.head, least_chunks=most[1])
        return most[0] - len(lengths)

    def idle(self, checkpointed: bool) -> torch.Tensor:
        """Compute a segment of one token for nothing: zero, and in the graph, so that it has a backward pass too."""
        inputs = {name: tensor[:1, :1] for name, tensor in self.inputs.items()}
        kwargs = dict(self.kwargs, **inputs, attention_mask=None, position_ids=self.positions[:1, :1])
        run = run_checkpointed if checkpointed else run_segment
        past = [(layer.prefix, layer.cores) for layer in self.new_past()]
        head = None if self.scoring is None else self.scoring.of_nothing()
        token = current_watch.set(None)
        try:
            output = run(self.decoder, self.forward, head, past, None, None, 0, kwargs).output
        finally:
            current_watch.reset(token)
        return (output.last_hidden_state if head is None else output.hidden_states[0])[..., :0].sum()


@uncompiled
def agreed_maximum(decoder: nn.Module, numbers: list[int], device: torch.device) -> list[int] | None:
    """The largest of each number in all processes, if parameters are sharded; else None."""
    if not (dist.is_available() and dist.is_initialized() and is_sharded(list(decoder.parameters()))):
        return None
    most = torch.tensor(numbers, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


@decides
def replay(
    decoder: nn.Module,
    forward: Callable[..., BaseModelOutputWithPast],
    policy: CachePolicy,
    border: torch.Tensor | None,
    task_of: TaskOf | None,
    inputs: dict[str, torch.Tensor],
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    parameters: list[nn.Parameter],
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Run the decoder over whole sequences under the bounded cache.

    Args:
        decoder, forward: the Hugging Face decoder and its own forward.
        policy: of the active adapters.
        border: [B], the caller's column of each row's first thought; may be None for an integer prefix.
        task_of: what is wanted instead of hidden states, per token (heads.py); None: hidden states.
        inputs: `{"input_ids": [B, T]}` or `{"inputs_embeds": [B, T, D]}`.
        attention_mask: [B, T] or None. position_ids: [B or 1, T].
        parameters: what is trained, of the decoder and of the head.

    With the model's gradient checkpointing on, each segment is computed again in the backward pass. With
    `gradient="truncated"` see truncated.py.

    Returns:
        The decoder's output in the caller's layout, without a cache.

    Raises:
        ValueError: reentrant checkpointing; an offload without checkpointing; or as `join_outputs`.
    """
    x = next(iter(inputs.values()))
    batch_size, length = x.shape[:2]
    checkpointed = checkpoints_layers(decoder) and decoder.training and torch.is_grad_enabled()
    truncated = policy.gradient == "truncated" and torch.is_grad_enabled()
    if policy.offload and decoder.training and torch.is_grad_enabled() and not checkpointed:
        raise ValueError(
            "PTEConfig: `offload` is True, but it moves what gradient checkpointing keeps, which is off. Call "
            "`model.gradient_checkpointing_enable()` or set `gradient_checkpointing=True` in the training arguments."
        )
    if attention_mask is not None:
        valid = attention_mask.to(x.device).bool()
    else:  # what the host knows, the layout is computed on the host from: nothing waits for the device then
        host_knows = border is None or border.device.type == "cpu"
        valid = torch.ones(batch_size, length, dtype=torch.bool, device="cpu" if host_knows else x.device)
    layout = Layout.create(valid, border, policy)
    is_padded = not bool(layout.valid.all())
    layout = layout.to(x.device)
    valid = layout.given
    schedule = Schedule.create(layout.window, policy.eviction_ratio)
    watch = current_watch.get()
    if watch is not None:
        columns = torch.arange(layout.valid.shape[1], device=x.device)
        ends = torch.where(layout.valid, columns + 1, 0).amax(-1)
        thoughts = (ends - layout.prefix).tolist()
        watch.evictions = torch.tensor([schedule.num_evictions(count) for count in thoughts], device=x.device)
    scoring = None
    if task_of is not None:
        task = task_of(inputs["input_ids"], valid, border)
        needed = layout.place(task.needed)
        scoring = Scoring(task.head, layout.place(task.targets), needed, needed.any(0).tolist())
    run = Replay(
        decoder=decoder,
        forward=forward,
        scoring=scoring,
        layout=layout,
        schedule=schedule,
        longest=max(schedule.num_evicted, SHORTEST_PIECE) if checkpointed or truncated else None,
        inputs={name: layout.place(tensor) for name, tensor in embedded_rows(decoder, inputs).items()},
        positions=layout.place(position_ids.expand(batch_size, -1)),
        mask=layout.valid if is_padded else None,
        kwargs=kwargs,
    )
    embeds = run.inputs.get("inputs_embeds")
    trains = bool(parameters) or (embeds is not None and embeds.requires_grad)
    in_two_passes = truncated and trains and sum(1 for _ in run.groups()) > 1
    if in_two_passes and not (is_sharded(parameters) or has_gathered_encoders(decoder)):
        if scoring is None and kwargs.get(
            "output_router_logits", getattr(decoder.config, "output_router_logits", False)
        ):
            raise ValueError(
                "PTEConfig: `gradient` is 'truncated', but router logits were asked for (`output_router_logits`), "
                "whose auxiliary loss would have no gradient. Switch them off, or use gradient='full'."
            )
        *results, first_column = TruncatedReplay.apply(run, embeds, *parameters)
        if scoring is not None:
            outputs = [DecoderOutput(last_hidden_state=first_column, hidden_states=tuple(results))]
        else:
            last_hidden_state, *hidden_states = results
            outputs = [DecoderOutput(last_hidden_state, hidden_states=tuple(hidden_states) or None)]
    else:
        outputs = run.run_all(truncated, checkpointed or truncated, offload=policy.offload or truncated)
    if scoring is not None:
        parts = zip(*(output.hidden_states for output in outputs))
        first, second = (layout.restore(torch.cat(part, dim=1)) for part in parts)
        is_whole = run.mask is None and layout.source is None and layout.valid.shape == valid.shape
        return as_output(outputs[0].last_hidden_state, (first, second), None if is_whole else valid)
    return join_outputs(outputs, layout.restore)


@uncompiled
def join_outputs(
    outputs: list[BaseModelOutputWithPast], restore: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> BaseModelOutputWithPast:
    """Join the outputs of segments along the sequence, without their caches.

    `restore` brings [B, T', D] back to the caller's layout.

    Raises:
        ValueError: an output was asked for that has no meaning across segments (attention maps).
    """

    def join(*parts: torch.Tensor) -> torch.Tensor:
        joined = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return joined if restore is None else restore(joined)

    result = {}
    for name, value in outputs[0].items():
        if name in CACHE_NAMES:  # None, or the caller's, who adds it again
            continue
        if name == "last_hidden_state":
            result[name] = join(*(output[name] for output in outputs))
        elif name == "hidden_states":
            result[name] = tuple(map(join, *(output[name] for output in outputs)))
        elif name == "router_logits":  # of each layer [B q, experts]
            split = [[x.unflatten(0, output.last_hidden_state.shape[:2]) for x in output[name]] for output in outputs]
            result[name] = tuple(join(*parts).flatten(0, 1) for parts in zip(*split))
        elif len(outputs) == 1:
            result[name] = value
        else:
            raise ValueError(
                f"`{name}` cannot be returned: the input is longer than the window, so it is computed in "
                f"{len(outputs)} segments with different caches, and there is no single `{name}` for it. Leave "
                f"`output_{name}` out."
            )
    return type(outputs[0])(**result)
