"""Encoding, reading the state and compaction, in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import LIMITS, compare, poisoned

import peft_pte_kernels
from peft_pte_kernels import Rotation, reference
from peft_pte_kernels.ops import cache, encode, state

DTYPES = st.sampled_from(list(LIMITS))


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def laid_out(x: torch.Tensor, layout: int) -> torch.Tensor:
    """`x` [B, H, m, D] as a cache may hold it: contiguous, a window into more slots, or tokens before heads."""
    if layout == 0:
        return x
    if layout == 1:
        room = torch.full((*x.shape[:2], x.shape[2] + 5, x.shape[3]), float("nan"), dtype=x.dtype)
        room[:, :, 3:-2] = x
        return room[:, :, 3:-2]
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@st.composite
def encodings(draw: st.DrawFn, update: str) -> dict[str, Any]:
    """Odd sizes, several layers, all layouts, rotations, masks and convolutions; encoded once or twice in a row."""
    num_layers, num_rows, num_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    head_dim = draw(st.sampled_from([4, 16, 24, 32, 40]))
    m, r, layout = draw(st.integers(1, 70)), draw(st.sampled_from([4, 5, 8, 16, 20, 32])), draw(st.integers(0, 2))
    dtype = draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    columns = [random(generator, num_layers, num_rows, num_heads, m, head_dim) for _ in range(2)]
    weights = [random(generator, num_layers, r, num_heads * head_dim) / (num_heads * head_dim) ** 0.5 for _ in range(2)]
    rotation = None
    half = draw(st.sampled_from([0, head_dim // 4, head_dim // 2]))
    if half:
        tokens = m if draw(st.booleans()) else 1  # one position for all tokens: `encode_keys="chunk"`
        angles = random(generator, draw(st.sampled_from([1, num_rows])), tokens, half)
        rotation = Rotation(angles.cos().float(), angles.sin().float(), draw(st.booleans()))
    mask_rows = draw(st.sampled_from([1, num_rows]))
    valid = torch.rand(mask_rows, m, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    valid[0] &= draw(st.booleans())  # also a row without tokens beside others
    num_carried = draw(st.integers(0, 3))
    num_taps = num_carried + (update == "delta" and draw(st.booleans()))  # the last one may be a gate of writes
    taps = [random(generator, num_taps, r) / 2 for _ in range(num_layers)] if num_taps else []
    return dict(
        tensors=[laid_out(x, layout).to(dtype) for column in columns for x in column]
        + [x.to(draw(st.sampled_from([torch.float32, dtype]))) for x in (*weights[0], *weights[1], *taps)]
        + [random(generator, num_layers, num_rows, r + num_carried, r).float()],
        rotation=rotation,
        valid=draw(st.sampled_from([valid, None])),
        update=update,
        times=draw(st.sampled_from([1, 2])) if m < 10 else 1,
        limit=LIMITS[dtype],
    )


def unpacked(function: Any, case: dict[str, Any], dtype: torch.dtype) -> Any:
    """`function` of a flat list of tensors."""
    rotation = case["rotation"]
    if rotation is not None:
        rotation = Rotation(rotation.cos.to(dtype), rotation.sin.to(dtype), rotation.interleaved)

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        *tensors, cores = tensors
        size = len(cores)
        columns = [list(tensors[i : i + size]) for i in range(0, len(tensors), size)]
        for _ in range(case.get("times", 1)):
            cores = function(*columns[:4], cores, case["update"], rotation, case["valid"], *columns[4:])
        return [cores]

    return call


@pytest.mark.parametrize("update", ["sum", "delta"])
@settings(max_examples=18)
@given(st.data())
def test_encode(update: str, data: st.DataObject) -> None:
    case = data.draw(encodings(update))
    kernel = unpacked(peft_pte_kernels.encode, case, torch.float32)
    compare(kernel, unpacked(reference.encode, case, torch.float64), case["tensors"], case["limit"])


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_tables_of_one_row_serve_all(tokens: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (random(generator, 1, 3, 2, 9, 16).float() for _ in range(2))
    weights = [random(generator, 8, 32).float() / 6 for _ in range(2)]
    angles = random(generator, 1, tokens, 8).float()
    valid = torch.rand(1, 9, generator=generator) < 0.7 if masked else None
    case = dict(rotation=Rotation(angles.cos(), angles.sin(), False), valid=valid, update="delta")
    tensors = [*keys, *values, *weights, random(generator, 1, 3, 8, 8).float()]
    plain = unpacked(reference.encode, case, torch.float64)
    compare(unpacked(peft_pte_kernels.encode, case, torch.float32), plain, tensors, 2e-6)


def test_parallel_keys() -> None:
    """The hard case of the delta rule: inverses by powers of N would lose all digits here."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (random(generator, 1, 2, 100, 32) for _ in range(2))
    keys = keys[:, :, :1] + 1e-2 * keys
    weights = [random(generator, 16, 64) / 8 for _ in range(2)]
    tensors = [x.float() for x in (keys, values, *weights, random(generator, 1, 1, 16, 16))]
    case = dict(rotation=None, valid=None, update="delta")
    plain = unpacked(reference.encode, case, torch.float64)
    compare(unpacked(peft_pte_kernels.encode, case, torch.float32), plain, tensors, 2e-5)


def test_garbage_in_masked_slots_is_not_read() -> None:
    """Also as the predicate of an event: a row without valid tokens keeps its core, whatever its slots hold."""
    generator = torch.Generator().manual_seed(0)
    keys, values = ([random(generator, 2, 2, 9, 16).float().requires_grad_()] for _ in range(2))
    weights = [[random(generator, 8, 32).float().requires_grad_()] for _ in range(2)]
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, 4:], valid[1] = False, False
    for update, num_carried, num_taps in (
        ("sum", 0, 0),
        ("delta", 0, 0),
        ("delta", 2, 2),
        ("delta", 0, 1),
        ("delta", 2, 3),
    ):
        cores = random(generator, 1, 2, 8 + num_carried, 8).float()
        taps = [random(generator, num_taps, 8).float().requires_grad_()] if num_taps else None
        expected = peft_pte_kernels.encode(keys, values, *weights, cores, update, None, valid, taps)
        poisoned_inputs = [
            [x[0].detach().masked_fill(~valid[:, None, :, None], float("nan")).requires_grad_()] for x in (keys, values)
        ]
        actual = peft_pte_kernels.encode(*poisoned_inputs, *weights, cores, update, None, valid, taps)
        assert torch.equal(actual, expected) and torch.equal(actual[:, 1], cores[:, 1])
        leaves = [*poisoned_inputs[0], *poisoned_inputs[1], *weights[0], *(taps or [])]
        gradients = torch.autograd.grad(actual.sum(), leaves)
        assert all(x.isfinite().all() for x in gradients)
        assert not gradients[0][1].any() and not gradients[0][0, :, 4:].any()


@pytest.mark.parametrize("update, gated", [("sum", False), ("delta", False), ("delta", True)])
def test_keys_are_convolved_across_calls(update: str, gated: bool) -> None:
    """However a sequence is cut into evictions, with gaps between its tokens, down to single ones and none."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (random(generator, 2, 2, 30, 16).float() for _ in range(2))
    weights = [[random(generator, 8, 32).float() / 6] for _ in range(2)]
    taps, valid = [random(generator, 3 + gated, 8).float()], torch.rand(2, 30, generator=generator) < 0.7
    start = random(generator, 1, 2, 11, 8).float()
    expected = peft_pte_kernels.encode([keys], [values], *weights, start, update, None, valid, taps)
    actual, first = start, 0
    for count in (1, 1, 17, 2, 9):
        k, v, mask = (x[..., first : first + count, :] for x in (keys, values, valid[..., None]))
        actual = peft_pte_kernels.encode([k], [v], *weights, actual, update, None, mask[..., 0], taps)
        first += count
    assert first == 30
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    tokens = [keys[row][:, valid[row]][:, -3:].transpose(0, 1).flatten(1) @ weights[0][0].mT for row in range(2)]
    torch.testing.assert_close(actual[0, :, 8:], torch.stack(tokens), rtol=1e-4, atol=1e-5)


def test_layers_that_differ_are_launched_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = [random(generator, 2, 2, 5, 16).float(), random(generator, 2, 5, 2, 16).float().transpose(1, 2)]
    values = [random(generator, 2, 2, 5, 16).float() for _ in range(2)]
    weights = [[random(generator, 8, 32).float() for _ in range(2)] for _ in range(2)]
    taps, valid = [random(generator, 1, 8).float() for _ in range(2)], torch.tensor([[True, True, False, True, True]])
    tensors = [*keys, *values, *weights[0], *weights[1], *taps, torch.zeros(2, 2, 9, 8)]
    case = dict(rotation=None, valid=valid, update="delta")
    plain = unpacked(reference.encode, case, torch.float64)
    compare(unpacked(peft_pte_kernels.encode, case, torch.float32), plain, tensors, 2e-6)


@settings(max_examples=60)
@given(st.data())
def test_read_state(data: st.DataObject) -> None:
    num_layers, num_rows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    r = data.draw(st.sampled_from([2, 3, 8, 16, 20, 32, 48]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    carried = r + data.draw(st.sampled_from([0, 1, 3]))  # with the keys that a convolution carries under each core
    shapes = (
        (num_layers, num_rows, carried, r),
        (num_layers, r, r),
        (num_layers, data.draw(st.sampled_from([1, num_rows])), data.draw(st.sampled_from([r, carried])), r),
    )
    options = data.draw(st.booleans()), data.draw(st.sampled_from(["none", "bound", "row", "frobenius"]))
    compare(
        lambda *tensors: [peft_pte_kernels.read_state(*(x[..., :r, :] for x in tensors), *options)],
        lambda *tensors: [reference.read_state(*(x[..., :r, :] for x in tensors), *options)],
        [random(generator, *shape).float() for shape in shapes],
        LIMITS[torch.float32],
    )


def test_cores_are_read_where_they_lie() -> None:
    """Also if there are other rows between them."""
    cores, query = torch.randn(2, 3, 9, 8)[:, :, :8], torch.randn(2, 8, 8)
    with patch.object(state, "launch") as launch:
        state.read_states(cores, query, query[:, None], False, "bound")
        state.read_states_backward(torch.ones(2, 3, 8, 8), cores, query, query[:, None], False, "bound")
    reads = [call.args[2:] for call in launch.call_args_list]
    assert len(reads) == 2 and all(any(x is cores for x in arguments) for arguments in reads)


@settings(max_examples=60)
@given(st.data())
def test_compact(data: st.DataObject) -> None:
    """The bytes of every slot that stays; overlapping moves, fewer or more slots than a block."""
    num_rows, num_heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    length = data.draw(st.integers(2, 180))
    count = data.draw(st.integers(1, length))
    start = data.draw(st.integers(0, length - count))
    shape = num_rows, num_heads, length + data.draw(st.integers(0, 3)), data.draw(st.sampled_from([4, 24, 64, 80, 520]))
    dtype = data.draw(DTYPES)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    slots = [torch.randn(shape, generator=generator).to(dtype) for _ in range(data.draw(st.sampled_from([1, 4])))]
    expected = [x.clone() for x in slots]
    reference.compact(expected, start, count, length)
    peft_pte_kernels.compact(slots, start, count, length)
    for x, y in zip(slots, expected, strict=True):
        assert torch.equal(x[..., : length - count, :], y[..., : length - count, :])


@pytest.mark.parametrize("num_heads", [(2, 2), (2, 3)])
def test_autograd_notices_what_compact_changes(num_heads: tuple[int, int]) -> None:
    """Slots alike, which are moved in one launch, and different ones."""
    slots = [torch.randn(1, heads, 20, 8).requires_grad_() for heads in num_heads]
    outputs = [(x * x).sum() for x in slots]
    expected = [x.detach().clone() for x in slots]
    reference.compact(expected, 3, 4, 18)
    with torch.no_grad():
        peft_pte_kernels.compact(slots, 3, 4, 18)
    for x, y, output in zip(slots, expected, outputs):
        assert torch.equal(x[:, :, :14], y[:, :, :14])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


@pytest.mark.parametrize(
    "delta, num_layers, num_carried, num_taps",
    [(True, 1, 0, 0), (True, 2, 2, 2), (True, 2, 1, 2), (True, 1, 0, 1), (False, 1, 1, 1), (False, 2, 0, 0)],
)
def test_ops_are_registered_properly(delta: bool, num_layers: int, num_carried: int, num_taps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values, *weights, taps = (
        [random(generator, *shape).float().requires_grad_() for _ in range(num_layers)]
        for shape in ((2, 2, 5, 16), (2, 2, 5, 16), (8, 32), (8, 32), (num_taps, 8))
    )
    taps = taps if num_taps else []
    carried = torch.zeros(num_layers, 2, 8 + num_carried, 8, requires_grad=True)
    angles = random(generator, 2, 5, 8).float()
    valid = torch.rand(2, 5, generator=generator) < 0.7
    rest = (delta, angles.cos(), angles.sin(), False, valid)
    torch.library.opcheck(encode.encode_cores_op, (keys, values, *weights, carried, *rest, taps))
    plain = [[x.detach() for x in column] for column in (keys, values, *weights)]
    for needs_inputs in (True, False):
        arguments = (torch.ones_like(carried), *plain, carried.detach(), *rest, [x.detach() for x in taps])
        torch.library.opcheck(encode.encode_cores_backward_op, (*arguments, needs_inputs))
    cores = carried.detach()[:, :, :8].requires_grad_()
    query = random(generator, num_layers, 8, 8).float().requires_grad_()
    initial = random(generator, num_layers, 1, 8, 8).float().requires_grad_()
    torch.library.opcheck(state.read_states_op, (cores, query, initial, delta, "row"))
    detached = [x.detach() for x in (cores, query, initial)]
    torch.library.opcheck(state.read_states_backward_op, (torch.ones_like(detached[0]), *detached, delta, "row"))
    torch.library.opcheck(cache.compact_op, ([x.detach().clone() for x in keys], 1, 2, 5))


def test_nothing_is_left_unwritten() -> None:
    """The poison of `compare` does reach the memory that kernels write to."""
    with poisoned():
        assert torch.empty_like(torch.zeros(2, 2)).isnan().all()
