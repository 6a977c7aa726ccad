"""Evict-encode-update: keys and values that leave the cache are read in place and written into the cores of all layers.

Two launches for the whole model. `project` is parallel over layers, rows and blocks of tokens: it takes the rotary
position out of the keys, projects keys and values, and for the delta rule solves each block's triangular system as far
as it does not depend on the core. `update` goes over the blocks of one row and layer in order.

For the delta rule, with unit keys k and N = strict_lower(K K^T) of a block, u = (I + N)^-1 (V - K M) is computed as
u = u_0 - w M with [w, u_0] = (I + N)^-1 [K, V], and M <- M + K^T u. The inverse is applied by forward substitution,
which is stable for parallel keys too (the weights of earlier tokens are bounded by one).

`valid` is read on the device: of a row without valid tokens nothing is loaded and its core stays, so it also serves as
the predicate of an event that only the device knows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from ..dispatch import launch, limits, precision, register, tile
from .encode_kernels import (
    block_backward_kernel,
    project_backward_kernel,
    project_kernel,
    update_backward_kernel,
    update_kernel,
)

# Tokens that are projected together: the more, the less often the weights are read.
TOKENS = 64
# Elements of a head that are projected together: three TF32 passes hold them in registers several times.
HEAD_SLICE = 16
# Tokens of a block of the delta rule: wider ones make the substitution longer and do not fit into registers.
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

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """L, B, m, H, D, r."""
        num_rows, num_heads, num_tokens, head_dim = self.keys[0].shape
        return len(self.keys), num_rows, num_tokens, num_heads, head_dim, self.cores.shape[-1]

    def columns(self) -> tuple[list[torch.Tensor], ...]:
        return self.keys, self.values, self.key_weights, self.value_weights

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
            HALF=0 if self.cos is None else self.cos.shape[-1],
            INTERLEAVED=self.interleaved,
            HAS_VALID=self.valid is not None,
            TABLE=len(self.keys) > 1,
            BN=BLOCK,
            BR=tile(r),
            PRECISION=precision(),
            device=self.keys[0].device,
            num_warps=4,
            **limits(),
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
) -> Call:
    """Bring the arguments into the layouts that the kernels read."""
    keys, values = ([x if x.stride(-1) == 1 else x.contiguous() for x in column] for column in (keys, values))
    key_weights, value_weights = ([x.contiguous() for x in column] for column in (key_weights, value_weights))
    if cos is not None and sin is not None:
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
    if valid is not None:
        valid = valid.expand(cores.shape[1], -1).contiguous().view(torch.uint8)
    return Call(keys, values, key_weights, value_weights, cores.contiguous(), delta, cos, sin, interleaved, valid)


def addresses(*columns: list[torch.Tensor]) -> torch.Tensor:
    """The addresses of tensors, one row for each column, on their device; unused for a single layer."""
    if len(columns[0]) == 1:
        return columns[0][0]
    pointers = torch.tensor([[x.data_ptr() for x in column] for column in columns], dtype=torch.int64)
    device = columns[0][0].device
    return pointers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pointers


class Projected(NamedTuple):
    """What `project` leaves for the other kernels."""

    keys: torch.Tensor
    norms: torch.Tensor
    w: torch.Tensor
    u: torch.Tensor


def project(call: Call) -> Projected:
    """Launch `project_kernel`. The first axis of a grid may be long; the others end at 65,535."""
    num_layers, num_rows, m, num_heads, head_dim, r = call.sizes
    some = call.cores
    keys, w, u = (some.new_empty(num_layers, num_rows, m, r) for _ in range(3))
    norms = some.new_empty(num_layers, num_rows, m)
    k, v = call.keys[0], call.values[0]
    cos, sin, valid, stride_cb, stride_cm = call.tables()
    launch(
        project_kernel,
        (num_layers * num_rows, triton.cdiv(m, TOKENS)),
        *(k, v, call.key_weights[0], call.value_weights[0], addresses(*call.columns()), cos, sin, valid),
        *(keys, norms, w, u, num_layers, num_rows, m, num_heads, head_dim),
        *(*k.stride()[:3], *v.stride()[:3], stride_cb, stride_cm, *valid.stride()[:2]),
        DELTA=call.delta,
        BP=TOKENS,
        BD=HEAD_SLICE,
        num_stages=2 if r <= 32 else 1,
        **dict(call.options(), num_warps=8 if r <= 32 else 4),
    )
    return Projected(keys, norms, w, u)


def update(call: Call, projected: Projected, save: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `update_kernel`; returns the new cores and, if `save`, those before each block."""
    num_layers, num_rows, m, _, _, r = call.sizes
    new = torch.empty_like(call.cores)
    saved = call.cores.new_empty(num_layers, num_rows, triton.cdiv(m, BLOCK), r, r) if save else new
    launch(
        update_kernel,
        (num_layers * num_rows,),
        *(projected.keys, projected.w, projected.u, call.cores, new, saved, m),
        **small_options(call),
        DELTA=call.delta,
        SAVE=save,
    )
    return new, saved


def small_options(call: Call) -> dict[str, Any]:
    """Constants of the kernels that see projections only."""
    options = call.options()
    shared = {name: options[name] for name in ("R", "BN", "BR", "PRECISION", "device", "num_warps")}
    return dict(shared, num_stages=1, **limits())


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
) -> torch.Tensor:
    """As `reference.encode`, with the fields of the rotation one by one; cores are float32."""
    call = prepared(keys, values, key_weights, value_weights, cores, delta, cos, sin, interleaved, valid)
    if not call.is_uniform():
        layers = (call.of_layer(layer) for layer in range(len(keys)))
        return torch.cat([update(layer, project(layer), save=False)[0] for layer in layers])
    return update(call, project(call), save=False)[0]


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
    needs_inputs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of keys and values [L, B, H, m, D] (empty unless `needs_inputs`), W_K, W_V [L, r, H D], and cores."""
    call = prepared(keys, values, key_weights, value_weights, cores, delta, cos, sin, interleaved, valid)
    if not call.is_uniform():
        layers = [
            encode_cores_backward(grad[layer : layer + 1], *call.of_layer(layer)[:-1], valid, needs_inputs)
            for layer in range(len(keys))
        ]
        return tuple(torch.cat(parts) for parts in zip(*layers))
    num_layers, num_rows, m, num_heads, head_dim, r = call.sizes
    grad = grad.contiguous()
    # What the forward computed is computed again: its inputs are alive anyway, its results would not be.
    projected = project(call)
    saved, block_grad, core_grad = grad, grad, grad.clone()
    if delta:
        _, saved = update(call, projected, save=True)
        block_grad = torch.empty_like(saved)
        launch(
            update_backward_kernel,
            (num_layers * num_rows,),
            *(projected.keys, projected.w, grad, core_grad, block_grad, m),
            **small_options(call),
        )
    key_grad, value_grad = torch.empty_like(projected.keys), torch.empty_like(projected.keys)
    launch(
        block_backward_kernel,
        (num_layers * num_rows, triton.cdiv(m, BLOCK)),
        *(projected.keys, projected.norms, projected.w, projected.u, saved, block_grad, key_grad, value_grad, m),
        DELTA=delta,
        **dict(small_options(call), num_warps=4 if r <= 32 else 8),
    )
    inputs, weights = [], []
    options = call.options()
    cos, sin, valid, stride_cb, stride_cm = call.tables()
    for x, weight, out_grad, is_key in (
        (call.keys, call.key_weights, key_grad, True),
        (call.values, call.value_weights, value_grad, False),
    ):
        x_grad = x[0].new_empty((num_layers, *x[0].shape) if needs_inputs else 0)
        weight_grad = grad.new_empty(num_layers, num_rows, r, num_heads * head_dim)
        launch(
            project_backward_kernel,
            (num_layers * num_rows, num_heads * triton.cdiv(head_dim, HEAD_SLICE)),
            *(x[0], weight[0], addresses(x, weight), cos, sin, valid, out_grad, x_grad, weight_grad),
            *(num_layers, num_rows, m, num_heads, head_dim, *x[0].stride()[:3], stride_cb, stride_cm),
            *valid.stride()[:2],
            X_GRAD=needs_inputs,
            BD=HEAD_SLICE,
            num_stages=2,
            **dict(options, HALF=options["HALF"] if is_key else 0),
        )
        inputs.append(x_grad)
        weights.append(weight_grad.sum(1).to(weight[0].dtype))
    return *inputs, *weights, core_grad


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
    shape = (len(keys), *keys[0].shape) if rest[-1] else (0,)
    weight_shape = (len(keys), *key_weights[0].shape)
    return (
        keys[0].new_empty(shape),
        values[0].new_empty(shape),
        key_weights[0].new_empty(weight_shape),
        value_weights[0].new_empty(weight_shape),
        torch.empty_like(cores, memory_format=torch.contiguous_format),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    keys, values, key_weights, value_weights, cores, ctx.delta, cos, sin, ctx.interleaved, valid = inputs
    ctx.num_layers = len(keys)
    ctx.save_for_backward(*keys, *values, *key_weights, *value_weights, cores, cos, sin, valid)


def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    *tensors, cores, cos, sin, valid = ctx.saved_tensors
    size = ctx.num_layers
    keys, values, key_weights, value_weights = (tensors[i * size : (i + 1) * size] for i in range(4))
    needs_inputs = any(ctx.needs_input_grad[0]) or any(ctx.needs_input_grad[1])
    key_grad, value_grad, key_weight_grad, value_weight_grad, core_grad = encode_cores_backward_op(
        *(grad, keys, values, key_weights, value_weights, cores, ctx.delta, cos, sin, ctx.interleaved, valid),
        needs_inputs,
    )
    inputs = (list(key_grad), list(value_grad)) if needs_inputs else ([None] * size, [None] * size)
    return *inputs, list(key_weight_grad), list(value_weight_grad), core_grad, None, None, None, None, None


encode_cores_backward_op = register(encode_cores_backward, fake_encode_cores_backward)
encode_cores_op = register(encode_cores, fake_encode_cores, setup_context, backward)
