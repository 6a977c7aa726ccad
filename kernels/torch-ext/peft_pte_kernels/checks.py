"""What the functions of this package ask of their arguments, whichever implementation runs.

A kernel reads memory by the sizes it is told. Where PyTorch would raise an error, or broadcast, it would read something
else.
"""

from __future__ import annotations

import torch

from .reference import UPDATES, Rotation

NORMS = ("none", "bound", "row", "frobenius")


def refuse(name: str, value: object, wanted: str) -> None:
    raise ValueError(f"`{name}` is {value}, but must be {wanted}.")


def expect(name: str, tensor: torch.Tensor, device: torch.device, layout: str, *sizes: int) -> None:
    """`tensor` has these sizes, which `layout` gives names to, and is on the device of the other arguments."""
    if tensor.shape != sizes:
        refuse(name, f"of shape {tuple(tensor.shape)}", f"{layout}, here {sizes}")
    if tensor.device != device:
        refuse(name, f"on {tensor.device}", f"on {device}, as the other arguments are")


def expect_dim(name: str, tensor: torch.Tensor, layout: str, dim: int) -> None:
    if tensor.dim() != dim:
        refuse(name, f"of shape {tuple(tensor.shape)}", layout)


def expect_length(name: str, items: list[torch.Tensor], length: int, one: str) -> None:
    if len(items) != length:
        refuse(name, f"a list of {len(items)}", f"one tensor for each {one}, here {length}")


def expect_integer(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        refuse(name, tensor.dtype, "of integers")


def encode(
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    key_weights: list[torch.Tensor],
    value_weights: list[torch.Tensor],
    cores: torch.Tensor,
    update: str,
    rotation: Rotation | None,
    valid: torch.Tensor | None,
    taps: list[torch.Tensor] | None,
) -> None:
    expect_dim("cores", cores, "[L, B, r + c - 1, r]", 4)
    num_layers, num_rows, carried, r = cores.shape
    device = cores.device
    if update not in UPDATES:
        refuse("update", repr(update), f"one of {', '.join(map(repr, UPDATES))}")
    if carried < r or (taps is None and carried != r):
        layout = "[L, B, r, r] without taps" if taps is None else "[L, B, r + c - 1, r]"
        refuse("cores", f"of shape {tuple(cores.shape)}", layout)
    if taps is not None:
        expect_length("taps", taps, num_layers, "layer")
        gated = taps[0].dim() == 2 and len(taps[0]) == carried - r + 1
        if gated and update != "delta":
            refuse("taps[0]", f"of shape {tuple(taps[0].shape)}", f"[c - 1, r]: update={update!r} has no gate")
        if carried == r and not gated:
            refuse("taps", f"a list of {num_layers}", f"None for cores that carry no keys, here {tuple(cores.shape)}")
        for layer, x in enumerate(taps):
            layout = "[c - 1, r] for cores of [L, B, r + c - 1, r], with a gate [c, r]"
            expect(f"taps[{layer}]", x, device, layout, carried - r + gated, r)
    columns = dict(keys=keys, values=values, key_weights=key_weights, value_weights=value_weights)
    for name, column in columns.items():
        expect_length(name, column, num_layers, "layer")
    expect_dim("keys[0]", keys[0], "[B, H, m, D]", 4)
    _, num_heads, m, head_dim = keys[0].shape
    for name, column in columns.items():
        is_weight = column is key_weights or column is value_weights
        layout = "[r, H D]" if is_weight else "[B, H, m, D]"
        sizes = (r, num_heads * head_dim) if is_weight else (num_rows, num_heads, m, head_dim)
        for layer, x in enumerate(column):
            expect(f"{name}[{layer}]", x, device, layout, *sizes)
    if rotation is not None:
        for name, table in (("cos", rotation.cos), ("sin", rotation.sin)):
            name, shape = f"rotation.{name}", tuple(table.shape)
            if table.dim() != 3 or shape[0] not in (1, num_rows) or shape[1] not in (1, m) or 2 * shape[2] > head_dim:
                wanted = f"[B or 1, m or 1, at most D / 2], here B = {num_rows}, m = {m}, D = {head_dim}"
                refuse(name, f"of shape {shape}", wanted)
            expect(name, table, device, "like rotation.cos", *rotation.cos.shape)
    if valid is not None:
        if tuple(valid.shape) not in ((1, m), (num_rows, m)):
            refuse("valid", f"of shape {tuple(valid.shape)}", f"[B or 1, m], here B = {num_rows}, m = {m}")
        if valid.dtype != torch.bool:
            refuse("valid", valid.dtype, "torch.bool")
        expect("valid", valid, device, "[B or 1, m]", *valid.shape)


def read_state(cores: torch.Tensor, query: torch.Tensor, initial: torch.Tensor, norm: str) -> None:
    expect_dim("cores", cores, "[L, B, r, r]", 4)
    num_layers, num_rows, r, _ = cores.shape
    expect("cores", cores, cores.device, "[L, B, r, r]", num_layers, num_rows, r, r)
    expect("query", query, cores.device, "[L, r, r]", num_layers, r, r)
    expect_dim("initial", initial, "[L, 1 or B, r, r]", 4)
    rows = 1 if initial.shape[1] == 1 else num_rows
    expect("initial", initial, cores.device, "[L, 1 or B, r, r]", num_layers, rows, r, r)
    if norm not in NORMS:
        refuse("norm", repr(norm), f"one of {', '.join(map(repr, NORMS))}")


def compact(slots: list[torch.Tensor], start: int, count: int, length: int) -> None:
    for index, x in enumerate(slots):
        expect_dim(f"slots[{index}]", x, "[B, H, capacity, D]", 4)
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            refuse(f"slots[{index}]", f"of strides {x.stride()}", "side by side in memory along its last dimension")
        if length > x.shape[2]:
            refuse("length", length, f"at most the {x.shape[2]} slots of slots[{index}]")
    if start < 0 or count < 0 or start + count > length:
        gap = f"start = {start}, count = {count}, length = {length}"
        refuse("start, count, length", gap, "a gap inside of the slots in use: 0 <= start <= start + count <= length")


def low_rank_update(
    x: torch.Tensor,
    bases: list[torch.Tensor],
    state: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    gate: torch.Tensor | None,
) -> None:
    """The only one that is called in each layer of each step, so in few words."""
    expect_dim("x", x, "[B, T, in]", 3)
    num_rows, num_tokens, width = x.shape
    r, device = state.shape[-1], x.device
    if not 1 <= len(bases) <= 3:
        refuse("bases", f"a list of {len(bases)}", "one tensor for each of one to three projections")
    expect("state", state, device, "[B, r, r]", num_rows, r, r)
    expect_length("A", A, len(bases), "projection")
    expect_length("B", B, len(bases), "projection")
    for base, a, b in zip(bases, A, B):
        out = a.shape[0]
        if a.shape != (out, r) or b.shape != (r, width) or base.shape != (num_rows, num_tokens, out):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (base, a, b))
            wanted = f"[B, T, out], [out, r], [r, in], here B = {num_rows}, T = {num_tokens}, r = {r}, in = {width}"
            refuse("bases, A, B", f"of shapes {shapes}", wanted)
    if gate is not None:
        if len(bases) > 1:
            refuse("gate", f"given with {len(bases)} projections", "None, or that of a single projection")
        expect("gate", gate, device, "[r, in]", r, width)


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, length: torch.Tensor
) -> None:
    expect_dim("query", query, "[B, H_q, 1, D]", 4)
    expect_dim("keys", keys, "[B, H, capacity, D]", 4)
    num_rows, num_queries, _, head_dim = query.shape
    _, num_heads, capacity, _ = keys.shape
    device = query.device
    expect("query", query, device, "[B, H_q, 1, D]", num_rows, num_queries, 1, head_dim)
    for name, x in (("keys", keys), ("values", values)):
        expect(name, x, device, "[B, H, capacity, D]", num_rows, num_heads, capacity, head_dim)
    if num_queries % num_heads:
        refuse("query", f"of {num_queries} heads", f"of a multiple of the {num_heads} heads of `keys`")
    for name, x, layout, size in (("first", first, "[B]", num_rows), ("length", length, "[1]", 1)):
        expect(name, x, device, layout, size)
        expect_integer(name, x)


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> None:
    if not logits.dim():
        refuse("logits", "of shape ()", "[..., vocab]")
    expect("targets", targets, logits.device, "[...] for logits of [..., vocab]", *logits.shape[:-1])
    expect_integer("targets", targets)
    if not temperature > 0:
        refuse("temperature", temperature, "larger than zero")
