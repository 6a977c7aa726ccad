"""Evict-encode-update: keys and values that leave the cache are read in place and written into the cores of all layers.

Two launches for the whole model. `project` is parallel over layers, rows and blocks of tokens: it takes the rotary
position out of the keys and projects keys and values. It stores what `valid` marks without gaps, so that the kernels
after it see rows of `count` tokens and no mask, and puts the keys that were carried with the core in front. `update`
goes over the tokens of one row and layer in order, block by block: it convolves the keys and writes them. What it needs
of the tokens before a block (keys to convolve, the core) so is there when it comes to it.

For the delta rule, with unit keys k and N = strict_lower(K K^T) of a block, u = (I + N)^-1 (V - K M) and
M <- M + K^T u. The inverse is made by forward substitution, which is stable for parallel keys too: its elements are
inner products of a key with another one that has gone through projections, and so no larger than one. With a gate,
sqrt(beta) k and sqrt(beta) v take their places, and what keys go through are reflections at most: no larger than two.

`valid` is read on the device: of a row without valid tokens nothing is loaded and its core stays, so it also serves as
the predicate of an event that only the device knows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from ..dispatch import launch, limits, num_warps, precision, register, tile
from .encode_backward_kernels import block_backward_kernel, project_backward_kernel, update_backward_kernel
from .encode_kernels import project_kernel, update_kernel

# Tokens that are projected together: the more, the less often the weights are read.
TOKENS = 64
# Elements of a head that are projected together: three TF32 passes hold them in registers several times.
HEAD_SLICE = 16
# Tokens of a block of the delta rule: wider ones make the substitution longer.
BLOCK = 16


class Call(NamedTuple):
    """The arguments of one encoding, as the kernels want them; all layers alike."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    key_weights: list[torch.Tensor]
    value_weights: list[torch.Tensor]
    cores: torch.Tensor
    delta: bool
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    interleaved: bool
    valid: torch.Tensor | None
    taps: list[torch.Tensor]  # with the gate of writes under them; none: neither convolution nor gate

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """L, B, m, H, D, r."""
        num_rows, num_heads, num_tokens, head_dim = self.keys[0].shape
        return len(self.keys), num_rows, num_tokens, num_heads, head_dim, self.cores.shape[-1]

    @property
    def num_carried(self) -> int:
        """c - 1, the rows of earlier keys under a core."""
        return self.cores.shape[2] - self.cores.shape[3]

    @property
    def num_gates(self) -> int:
        """1 if there is a gate of writes."""
        return len(self.taps[0]) - self.num_carried if self.taps else 0

    @property
    def some_taps(self) -> torch.Tensor:
        """Those of the first layer, or any tensor."""
        return self.taps[0] if self.taps else self.cores

    def columns(self) -> list[list[torch.Tensor]]:
        columns = [self.keys, self.values, self.key_weights, self.value_weights]
        return [*columns, self.taps] if self.taps else columns

    def is_uniform(self) -> bool:
        """Whether one launch can serve all layers: tensors that differ in their address only, which is aligned."""
        return all(
            (x.dtype, x.shape, x.stride()) == (column[0].dtype, column[0].shape, column[0].stride())
            and (len(column) == 1 or x.data_ptr() % 16 == 0)
            for column in self.columns()
            for x in column
        )

    def of_layer(self, layer: int) -> Call:
        return self._replace(
            keys=[self.keys[layer]],
            values=[self.values[layer]],
            key_weights=[self.key_weights[layer]],
            value_weights=[self.value_weights[layer]],
            cores=self.cores[layer : layer + 1],
            taps=self.taps[layer : layer + 1],
        )

    def tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """cos, sin, valid as the kernels get them (any tensor if there is none), and the strides of cos: zero where
        there is one table for all rows, or one position for all tokens."""
        some = self.keys[0]
        if self.cos is None:
            return some, some, some if self.valid is None else self.valid, 0, 0
        strides = (self.cos.stride(i) if self.cos.shape[i] > 1 else 0 for i in range(2))
        return self.cos, self.sin, some if self.valid is None else self.valid, *strides

    def options(self) -> dict[str, Any]:
        """Constants that all kernels share."""
        r = self.sizes[-1]
        return dict(
            R=r,
            C=self.num_carried + 1,
            TABLE=len(self.keys) > 1,
            BR=tile(r),
            PRECISION=precision(),
            device=self.keys[0].device,
            num_warps=4,
            num_stages=1,
            **limits(),
        )

    def reading_options(self) -> dict[str, Any]:
        """Constants of the kernels that read keys and values."""
        return dict(
            self.options(),
            HALF=0 if self.cos is None else self.cos.shape[-1],
            INTERLEAVED=self.interleaved,
            HAS_VALID=self.valid is not None,
            BD=HEAD_SLICE,
        )


def prepared(
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    key_weights: list[torch.Tensor],
    value_weights: list[torch.Tensor],
    cores: torch.Tensor,
    delta: bool,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    valid: torch.Tensor | None,
    taps: list[torch.Tensor],
) -> Call:
    """Bring the arguments into the layouts that the kernels read."""
    keys, values = ([x if x.stride(-1) == 1 else x.contiguous() for x in column] for column in (keys, values))
    key_weights, value_weights, taps = (
        [x.contiguous() for x in column] for column in (key_weights, value_weights, taps)
    )
    if cos is not None and sin is not None:
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
    if valid is not None:
        valid = valid.expand(cores.shape[1], -1).contiguous().view(torch.uint8)
    cores = cores.contiguous()
    return Call(keys, values, key_weights, value_weights, cores, delta, cos, sin, interleaved, valid, taps)


def addresses(*columns: list[torch.Tensor]) -> torch.Tensor:
    """The addresses of tensors, one row for each column, on their device; unused for a single layer."""
    if len(columns[0]) == 1:
        return columns[0][0]
    device, numbers = columns[0][0].device, [[x.data_ptr() for x in column] for column in columns]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return written_by_device(numbers, device)
    pointers = torch.tensor(numbers, dtype=torch.int64)
    return pointers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pointers


def written_by_device(numbers: list[list[int]], device: torch.device) -> torch.Tensor:
    """A table that a CUDA graph can make: a copy from the host would read memory that is another's at each replay."""
    each = [torch.full((1,), number, dtype=torch.int64, device=device) for row in numbers for number in row]
    return torch.cat(each).view(len(numbers), -1)


class Projected(NamedTuple):
    """What `project` leaves for the other kernels."""

    known: torch.Tensor  # projected keys, behind those that were carried
    values: torch.Tensor
    count: torch.Tensor
    table: torch.Tensor


class Updated(NamedTuple):
    """New cores; and what the delta rule's gradient needs of each block, if it was to be saved."""

    cores: torch.Tensor
    saved: torch.Tensor
    inverse: torch.Tensor


def project(call: Call) -> Projected:
    """Launch `project_kernel`. The first axis of a grid may be long; the others end at 65,535."""
    num_layers, num_rows, m, num_heads, head_dim, r = call.sizes
    known = call.cores.new_empty(num_layers, num_rows, call.num_carried + m, r)
    values = call.cores.new_empty(num_layers, num_rows, m, r)
    count = torch.empty(num_layers, num_rows, dtype=torch.int32, device=known.device)
    projected = Projected(known, values, count, addresses(*call.columns()))
    k, v = call.keys[0], call.values[0]
    cos, sin, valid, stride_cb, stride_cm = call.tables()
    launch(
        project_kernel,
        (num_layers * num_rows, triton.cdiv(m, TOKENS)),
        *(k, v, call.key_weights[0], call.value_weights[0], projected.table, cos, sin, valid, call.cores),
        *(known, values, count, num_layers, num_rows, m, num_heads, head_dim),
        *(*k.stride()[:3], *v.stride()[:3], stride_cb, stride_cm, *valid.stride()[:2]),
        BP=TOKENS,
        **dict(call.reading_options(), num_stages=2 if r <= 32 else 1, num_warps=num_warps(r)),
    )
    return projected


def update(call: Call, projected: Projected, save: bool) -> Updated:
    """Launch `update_kernel`."""
    num_layers, num_rows, m, _, _, r = call.sizes
    known, values, count, table = projected
    new = torch.empty_like(call.cores)
    saved = inverse = new
    if save:
        blocks = num_layers, num_rows, triton.cdiv(m, BLOCK)
        saved, inverse = new.new_empty(*blocks, r, r), new.new_empty(*blocks, BLOCK, BLOCK)
    launch(
        update_kernel,
        (num_layers * num_rows,),
        *(known, values, count, table, call.some_taps, call.cores, new, saved, inverse, num_layers, num_rows, m),
        GATE=call.num_gates,
        DELTA=call.delta,
        SAVE=save,
        BN=BLOCK,
        **call.options(),
    )
    return Updated(new, saved, inverse)


def encode_cores(
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    key_weights: list[torch.Tensor],
    value_weights: list[torch.Tensor],
    cores: torch.Tensor,
    delta: bool,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    valid: torch.Tensor | None,
    taps: list[torch.Tensor],
) -> torch.Tensor:
    """As `reference.encode`, with the fields of the rotation one by one and no `taps` for none; cores are float32."""
    call = prepared(keys, values, key_weights, value_weights, cores, delta, cos, sin, interleaved, valid, taps)
    if not call.is_uniform():
        layers = (call.of_layer(layer) for layer in range(len(keys)))
        return torch.cat([update(layer, project(layer), save=False).cores for layer in layers])
    return update(call, project(call), save=False).cores


def encode_cores_backward(
    grad: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    key_weights: list[torch.Tensor],
    value_weights: list[torch.Tensor],
    cores: torch.Tensor,
    delta: bool,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    valid: torch.Tensor | None,
    taps: list[torch.Tensor],
    needs_inputs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of keys and values [L, B, H, m, D] (empty unless `needs_inputs`), W_K, W_V [L, r, H D], cores, and
    taps [L, c - 1, r], with a gate [L, c, r]."""
    call = prepared(keys, values, key_weights, value_weights, cores, delta, cos, sin, interleaved, valid, taps)
    if not call.is_uniform():
        layers = [
            encode_cores_backward(
                grad[layer : layer + 1], *call.of_layer(layer)._replace(valid=valid), needs_inputs=needs_inputs
            )
            for layer in range(len(keys))
        ]
        return tuple(torch.cat(parts) for parts in zip(*layers))
    num_layers, num_rows, m, num_heads, head_dim, r = call.sizes
    grad = grad.contiguous()
    # What the forward computed is computed again: its inputs are alive anyway, its results would not be.
    projected = project(call)
    known, _, count, table = projected
    sizes, taps_of_first = (num_layers, num_rows, m), call.some_taps
    saved, inverse, block_grad = grad, grad, grad
    if delta:
        core_grad = torch.empty_like(grad)
        _, saved, inverse = update(call, projected, save=True)
        block_grad = torch.empty_like(saved)
        launch(
            update_backward_kernel,
            (num_layers * num_rows,),
            *(known, count, table, inverse, taps_of_first, grad, core_grad, block_grad, *sizes),
            GATE=call.num_gates,
            BN=BLOCK,
            **call.options(),
        )
    else:
        core_grad = grad.clone()
    key_grad, value_grad = torch.empty_like(projected.values), torch.empty_like(projected.values)
    logit_grad = grad.new_empty(sizes) if call.num_gates else grad
    launch(
        block_backward_kernel,
        (num_layers * num_rows, triton.cdiv(m, BLOCK)),
        *(*projected, taps_of_first, saved, inverse, block_grad, key_grad, value_grad, logit_grad, *sizes),
        GATE=call.num_gates,
        DELTA=delta,
        BN=BLOCK,
        **dict(call.options(), num_warps=4 if r <= 32 else 8),
    )
    inputs, weights = [], []
    cos, sin, valid, stride_cb, stride_cm = call.tables()
    tap_grad = grad.new_empty(num_layers, num_rows, call.num_carried + call.num_gates, r)
    options = dict(call.reading_options(), X_GRAD=needs_inputs, BN=BLOCK, num_stages=2 if r <= 32 else 1)
    num_chunks = num_heads * triton.cdiv(head_dim, HEAD_SLICE)
    columns = (call.keys, call.key_weights, key_grad), (call.values, call.value_weights, value_grad)
    for column, (x, weight, out_grad) in enumerate(columns):
        own = dict(options, COLUMN=column, GATE=call.num_gates)
        own = own if column == 0 else dict(own, C=1, GATE=0, HALF=0)
        x_grad = x[0].new_empty((num_layers, *x[0].shape) if needs_inputs else 0)
        weight_grad = grad.new_empty(num_layers, num_rows, r, num_heads * head_dim)
        launch(
            project_backward_kernel,
            (num_layers * num_rows, num_chunks + (own["C"] > 1 or own["GATE"])),
            *(x[0], weight[0], table, cos, sin, valid, known, count, taps_of_first, grad, core_grad),
            *(out_grad, logit_grad, x_grad, weight_grad, tap_grad, *sizes, num_heads, head_dim),
            *(*x[0].stride()[:3], stride_cb, stride_cm, *valid.stride()[:2]),
            **own,
        )
        inputs.append(x_grad)
        weights.append(weight_grad.sum(1).to(weight[0].dtype))
    return *inputs, *weights, core_grad, tap_grad.sum(1).to(taps_of_first.dtype)


def fake_encode_cores(keys: list[torch.Tensor], values: Any, key_weights: Any, value_weights: Any, cores: torch.Tensor,
                      *rest: Any) -> torch.Tensor:  # fmt: skip
    return torch.empty_like(cores, memory_format=torch.contiguous_format)


def fake_encode_cores_backward(
    grad: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    key_weights: list[torch.Tensor],
    value_weights: list[torch.Tensor],
    cores: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    *_, taps, needs_inputs = rest
    shape = (len(keys), *keys[0].shape) if needs_inputs else (0,)
    weight_shape = (len(keys), *key_weights[0].shape)
    num_layers, _, num_rows, r = cores.shape
    num_taps = len(taps[0]) if taps else num_rows - r
    return (
        keys[0].new_empty(shape),
        values[0].new_empty(shape),
        key_weights[0].new_empty(weight_shape),
        value_weights[0].new_empty(weight_shape),
        torch.empty_like(cores, memory_format=torch.contiguous_format),
        (taps[0] if taps else cores).new_empty(num_layers, num_taps, r),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    keys, values, key_weights, value_weights, cores, ctx.delta, cos, sin, ctx.interleaved, valid, taps = inputs
    ctx.num_layers = len(keys)
    ctx.save_for_backward(cores, cos, sin, valid, *keys, *values, *key_weights, *value_weights, *taps)


def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    cores, cos, sin, valid, *tensors = ctx.saved_tensors
    size = ctx.num_layers
    keys, values, key_weights, value_weights, taps = (tensors[i * size : (i + 1) * size] for i in range(5))
    needs_inputs = any(ctx.needs_input_grad[0]) or any(ctx.needs_input_grad[1])
    key_grad, value_grad, key_weight_grad, value_weight_grad, core_grad, tap_grad = encode_cores_backward_op(
        *(grad, keys, values, key_weights, value_weights, cores, ctx.delta, cos, sin, ctx.interleaved, valid, taps),
        needs_inputs,
    )
    inputs = (list(key_grad), list(value_grad)) if needs_inputs else ([None] * size, [None] * size)
    rest = core_grad, None, None, None, None, None, list(tap_grad) if taps else []
    return *inputs, list(key_weight_grad), list(value_weight_grad), *rest


encode_cores_backward_op = register(encode_cores_backward, fake_encode_cores_backward)
encode_cores_op = register(encode_cores, fake_encode_cores, setup_context, backward)
