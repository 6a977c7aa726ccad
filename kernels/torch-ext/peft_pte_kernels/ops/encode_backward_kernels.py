"""The Triton kernels of the gradients in `encode.py`, which says how they work together."""

from __future__ import annotations

import triton
import triton.language as tl

from .encode_kernels import (
    inverse_norms,
    layer_pointer,
    load_keys,
    load_rotated,
    load_tap,
    openness,
    rotation_partner,
    slots_of,
    tap_pointer,
    written_keys,
)


@triton.jit
def load_key_grad(
    grad, last_grad, taps, slots, is_key, count, r, R: tl.constexpr, C: tl.constexpr, CARRIED: tl.constexpr
):  # fmt: skip
    """Gradient of projected keys, [BN, BR]: of tokens, or of the keys that came before (CARRIED), at slots below zero.

    `grad`: of the row's convolved keys; `last_grad`: of the C - 1 keys that are carried on.
    """
    at = slots[:, None] * R + r[None, :]
    mask = is_key & (slots >= 0) if CARRIED else is_key
    key_grad = tl.load(grad + at, mask=mask[:, None] & (r < R)[None, :], other=0.0)
    for j in range(1, C):  # the key j tokens later was convolved with this one
        mask = is_key & (slots + j < count)
        if CARRIED:
            mask = mask & (slots + j >= 0)
        later = tl.load(grad + at + j * R, mask=mask[:, None] & (r < R)[None, :], other=0.0)
        key_grad += load_tap(taps, j, r, R) * later
    if C > 1:
        kept = slots + C - 1 - count
        mask = (is_key & (kept >= 0))[:, None] & (r < R)[None, :]
        key_grad += tl.load(last_grad + kept[:, None] * R + r[None, :], mask=mask, other=0.0)
    return key_grad


@triton.jit
def update_backward_kernel(
    known_ptr, count_ptr, table, inverse_ptr,  # as `project_kernel` and `update_kernel` leave them
    taps_ptr, grad_ptr, core_grad_ptr,         # [C - 1 + GATE, R]; gradients after and before, [L, B, R + C - 1, R]
    saved_grad_ptr,                            # gradient of the core after each block, [L, B, blocks, R, R]
    L, B, m,
    R: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, TABLE: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The blocks in reverse (delta rule): dM <- dM - K^T (I + N)^-T K dM, U transposed as in `update_kernel`. Carried
    keys are left to `project_backward_kernel`."""
    layer_row = tl.program_id(0).to(tl.int64)
    n, r = tl.arange(0, BN), tl.arange(0, BR)
    square = r[:, None] * R + r[None, :]
    square_mask = (r < R)[:, None] & (r < R)[None, :]
    taps = tap_pointer(taps_ptr, table, layer_row // B, L, C, GATE, TABLE)
    known = known_ptr + layer_row * (C - 1 + m) * R
    count = tl.load(count_ptr + layer_row)
    grad = tl.load(grad_ptr + layer_row * (R + C - 1) * R + square, mask=square_mask, other=0.0)
    num_blocks = tl.cdiv(count, BN)
    for i in range(num_blocks):
        start = (num_blocks - 1 - i) * BN
        block = layer_row * tl.cdiv(m, BN) + start // BN
        tl.store(saved_grad_ptr + block * R * R + square, grad, mask=square_mask)
        k = load_keys(known, taps, start + n, count, r, R, C)
        k, _ = written_keys(k, taps, r, R, C, GATE)
        inverse = tl.load(inverse_ptr + block * BN * BN + n[:, None] * BN + n[None, :])
        u_grad = tl.dot(tl.trans(grad), tl.trans(k), input_precision=PRECISION)
        u_grad = tl.dot(u_grad, inverse, input_precision=PRECISION)
        grad -= tl.dot(tl.trans(k), tl.trans(u_grad), input_precision=PRECISION)
    tl.store(core_grad_ptr + layer_row * (R + C - 1) * R + square, grad, mask=square_mask)


@triton.jit
def block_backward_kernel(
    known_ptr, value_ptr, count_ptr, table,  # as `project_kernel` leaves them
    taps_ptr,                                # [C - 1 + GATE, R]
    saved_ptr, inverse_ptr, grad_ptr,        # delta: as `update_kernel` and `update_backward_kernel` leave them;
                                             # sum: -, -, [L, B, R + C - 1, R]
    key_grad_ptr, value_grad_ptr,            # gradients of convolved keys and of values, [L, B, m, R]
    logit_grad_ptr,                          # GATE: gradient of g k, [L, B, m]
    L, B, m,
    R: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr, TABLE: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    layer_row = tl.program_id(0).to(tl.int64)
    n, r = tl.arange(0, BN), tl.arange(0, BR)
    slots = tl.program_id(1) * BN + n
    count = tl.load(count_ptr + layer_row)
    if tl.program_id(1) * BN >= count:
        return
    at = layer_row * m * R + slots[:, None] * R + r[None, :]
    mask = (slots < count)[:, None] & (r < R)[None, :]
    square = r[:, None] * R + r[None, :]
    square_mask = (r < R)[:, None] & (r < R)[None, :]
    taps = tap_pointer(taps_ptr, table, layer_row // B, L, C, GATE, TABLE)
    k = load_keys(known_ptr + layer_row * (C - 1 + m) * R, taps, slots, count, r, R, C)
    u = tl.load(value_ptr + at, mask=mask, other=0.0)
    if DELTA:
        norms = inverse_norms(k)
        unit = k * norms
        values = u
        if GATE:
            share = openness(k, taps, r, R, C)
            root = tl.sqrt(2 * share)[:, None]
            k = unit * root
            u = u * root
        else:
            k = unit
        block = layer_row * tl.num_programs(1) + tl.program_id(1)
        inverse = tl.load(inverse_ptr + block * BN * BN + n[:, None] * BN + n[None, :])
        core = tl.load(saved_ptr + block * R * R + square, mask=square_mask, other=0.0)
        u -= tl.dot(k, core, input_precision=PRECISION)
        u = tl.dot(inverse, u, input_precision=PRECISION)
        grad = tl.load(grad_ptr + block * R * R + square, mask=square_mask, other=0.0)
        value_grad = tl.dot(k, grad, input_precision=PRECISION)
        value_grad = tl.dot(tl.trans(inverse), value_grad, input_precision=PRECISION)
        lower = tl.where(n[:, None] > n[None, :], -tl.dot(value_grad, tl.trans(u), input_precision=PRECISION), 0.0)
        unit_grad = tl.dot(u, tl.trans(grad), input_precision=PRECISION)
        unit_grad -= tl.dot(value_grad, tl.trans(core), input_precision=PRECISION)
        unit_grad += tl.dot(lower + tl.trans(lower), k, input_precision=PRECISION)
        if GATE:  # so far they are of sqrt(beta) k and sqrt(beta) v
            logit_grad = tl.sum(unit_grad * unit, 1) + tl.sum(value_grad * values, 1)
            logit_grad = logit_grad[:, None] * root * (1 - share)[:, None] / 2
            unit_grad = unit_grad * root
            value_grad = value_grad * root
        key_grad = (unit_grad - unit * tl.sum(unit_grad * unit, 1)[:, None]) * norms
        if GATE:
            key_grad += logit_grad * load_tap(taps, C, r, R)
            tl.store(logit_grad_ptr + layer_row * m + slots, tl.sum(logit_grad, 1), mask=slots < count)
    else:
        grad = tl.load(grad_ptr + layer_row * (R + C - 1) * R + square, mask=square_mask, other=0.0)
        key_grad = tl.dot(u, tl.trans(grad), input_precision=PRECISION)
        value_grad = tl.dot(k, grad, input_precision=PRECISION)
    tl.store(key_grad_ptr + at, key_grad, mask=mask)
    tl.store(value_grad_ptr + at, value_grad, mask=mask)


@triton.jit
def convolution_backward(
    known, taps, out_grad, logit_grad, last_grad, carried_grad, tap_grad, count,
    R: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Gradients of a row's carried keys [C - 1, R] and, as a part of their sum over rows, of its taps and gate."""
    n, r = tl.arange(0, BN), tl.arange(0, BR)
    for start in range(0, C - 1, BN):
        slots = start + n - (C - 1)
        grad = load_key_grad(out_grad, last_grad, taps, slots, slots < 0, count, r, R, C, True)
        at = (start + n)[:, None] * R + r[None, :]
        tl.store(carried_grad + at, grad, mask=(slots < 0)[:, None] & (r < R)[None, :])
    for j in range(1, C):
        products = tl.zeros([BN, BR], tl.float32)
        for start in range(0, count, BN):
            mask = (start + n < count)[:, None] & (r < R)[None, :]
            at = (start + n)[:, None] * R + r[None, :]
            key = tl.load(known + (C - 1 - j) * R + at, mask=mask, other=0.0)
            products += key * tl.load(out_grad + at, mask=mask, other=0.0)
        tl.store(tap_grad + (j - 1) * R + r, tl.sum(products, 0), mask=r < R)
    if GATE:
        products = tl.zeros([BN, BR], tl.float32)
        for start in range(0, count, BN):
            logits = tl.load(logit_grad + start + n, mask=start + n < count, other=0.0)
            products += logits[:, None] * load_keys(known, taps, start + n, count, r, R, C)
        tl.store(tap_grad + (C - 1) * R + r, tl.sum(products, 0), mask=r < R)


@triton.jit
def project_backward_kernel(
    x_ptr, weight_ptr, table,            # keys or values [B, H, m, D]; W [R, H D]; addresses [4 or 5, L]
    cos_ptr, sin_ptr, valid_ptr,
    known_ptr, count_ptr,                # as `project_kernel` leaves them
    taps_ptr, grad_ptr, core_grad_ptr,   # as in `update_backward_kernel`
    out_grad_ptr, logit_grad_ptr,        # gradient of values or convolved keys, [L, B, m, R]; of g k, [L, B, m]
    x_grad_ptr, weight_grad_ptr,         # [L, B, H, m, D]; a part for each row, [L, B, R, H D] float32
    tap_grad_ptr,                        # a part for each row, [L, B, C - 1 + GATE, R] float32
    L, B, m, H, D,
    stride_xb, stride_xh, stride_xm, stride_cb, stride_cm, stride_valid_b, stride_valid_m,
    R: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_VALID: tl.constexpr, COLUMN: tl.constexpr, X_GRAD: tl.constexpr, TABLE: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of keys (COLUMN 0) or values (1, where C is 1 and GATE 0). If there are taps, the last program of a row is for
    them alone."""
    layer_row = tl.program_id(0).to(tl.int64)
    layer, row = layer_row // B, layer_row % B
    taps = tap_pointer(taps_ptr, table, layer, L, C, GATE, TABLE)
    count = tl.load(count_ptr + layer_row)
    out_grad_base = out_grad_ptr + layer_row * m * R
    carried = (layer_row * (R + C - 1) + R) * R
    if (C > 1 or GATE) and tl.program_id(1) == tl.num_programs(1) - 1:
        known, tap_grad = known_ptr + layer_row * (C - 1 + m) * R, tap_grad_ptr + layer_row * (C - 1 + GATE) * R
        last_grad, carried_grad = grad_ptr + carried, core_grad_ptr + carried
        logit_grad = logit_grad_ptr + layer_row * m
        convolution_backward(
            known, taps, out_grad_base, logit_grad, last_grad, carried_grad, tap_grad, count, R, C, GATE, BN, BR
        )
        return
    num_chunks = tl.cdiv(D, BD)
    h, d0 = (tl.program_id(1) // num_chunks).to(tl.int64), (tl.program_id(1) % num_chunks) * BD
    n, r, d = tl.arange(0, BN), tl.arange(0, BR), d0 + tl.arange(0, BD)
    base = layer_pointer(x_ptr, table + COLUMN * L, layer, TABLE) + row * stride_xb + h * stride_xh
    weight_base = layer_pointer(weight_ptr, table + (2 + COLUMN) * L, layer, TABLE) + h * D
    valid_base = valid_ptr + row * stride_valid_b
    weight_at = r[:, None] * (H * D)
    weight_mask = (r < R)[:, None] & (d < D)[None, :]
    cos_base, sin_base = cos_ptr + row * stride_cb, sin_ptr + row * stride_cb
    weight_grad = tl.zeros([BR, BD], tl.float32)
    before = 0
    for start in range(0, m, BN):
        tokens = start + n
        is_token, slots = slots_of(valid_base, stride_valid_m, tokens, m, before, HAS_VALID)
        before += tl.sum(is_token.to(tl.int32), 0)
        mask = is_token[:, None] & (d < D)[None, :]
        x = load_rotated(base, cos_base, sin_base, tokens, d, mask, stride_xm, stride_cm, HALF, INTERLEAVED)
        out_grad = load_key_grad(out_grad_base, grad_ptr + carried, taps, slots, is_token, count, r, R, C, False)
        weight_grad = tl.dot(tl.trans(out_grad), x, weight_grad, input_precision=PRECISION)
        if X_GRAD:
            x_grad = tl.zeros([BN, BD], tl.float32)
            # The transposed rotation, whose parts are summed in a loop so that they do not fill the registers at once.
            for part in range(2 if HALF > 0 else 1):
                column, factor = d[None, :], 1.0
                if HALF > 0:
                    angle, partner, sign = rotation_partner(d, HALF, INTERLEAVED)
                    column = tl.where(part == 0, d, partner)[None, :]
                    turned = mask & (d < 2 * HALF)[None, :]
                    at = tokens[:, None] * stride_cm + angle[None, :]
                    cos = tl.load(cos_base + at, mask=turned & (part == 0), other=1.0)
                    sin = tl.load(sin_base + at, mask=turned & (part == 1), other=0.0)
                    factor = tl.where(part == 0, cos, -sin * sign[None, :])
                w = tl.load(weight_base + weight_at + column, mask=weight_mask, other=0.0).to(tl.float32)
                x_grad += tl.dot(out_grad, w, input_precision=PRECISION) * factor
            at = (layer_row * H + h) * m * D + tokens[:, None] * D + d[None, :]
            tl.store(
                x_grad_ptr + at,
                x_grad.to(x_grad_ptr.dtype.element_ty),
                mask=(tokens < m)[:, None] & (d < D)[None, :],
            )
    at = layer_row * R * H * D + r[:, None] * (H * D) + h * D + d[None, :]
    tl.store(weight_grad_ptr + at, weight_grad, mask=weight_mask)
