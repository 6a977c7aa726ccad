"""The Triton kernels of `encode.py`, which says how they work together."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def layer_pointer(pointer, table, layer, TABLE: tl.constexpr):
    """The address of a layer's tensor: the pointer itself, or an entry of a table of addresses."""
    if TABLE:
        pointer = tl.multiple_of(tl.load(table + layer).to(pointer.dtype), 16)
    return pointer


@triton.jit
def rotation_partner(d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of each element of a head: its angle, the element it is turned with, and the sign of that one's part."""
    if INTERLEAVED:
        angle = d // 2
        partner = tl.where(d < 2 * HALF, d ^ 1, d)
        sign = tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        angle = d % HALF
        partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
        sign = tl.where(d < HALF, -1.0, 1.0)
    return angle, partner, sign


@triton.jit
def load_rotated(
    base, cos_ptr, sin_ptr, tokens, d, mask, stride_m, stride_cm, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """A tile [BN, BD] of keys or values in float32, rotated if HALF > 0. Masked elements are zero."""
    x = tl.load(base + tokens[:, None] * stride_m + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if HALF > 0:
        angle, partner, sign = rotation_partner(d, HALF, INTERLEAVED)
        # The partner's element comes from the same cache lines, so memory is still read once.
        y = tl.load(base + tokens[:, None] * stride_m + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        at = tokens[:, None] * stride_cm + angle[None, :]
        turned = mask & (d < 2 * HALF)[None, :]
        cos = tl.load(cos_ptr + at, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + at, mask=turned, other=0.0)
        x = x * cos + y * sin * sign[None, :]
    return x


@triton.jit
def strict_lower_products(k, BN: tl.constexpr, PRECISION: tl.constexpr):
    """N = strict_lower(K K^T), [BN, BN]."""
    n = tl.arange(0, BN)
    return tl.where(n[:, None] > n[None, :], tl.dot(k, tl.trans(k), input_precision=PRECISION), 0.0)


@triton.jit
def project_kernel(
    k_ptr, v_ptr, wk_ptr, wv_ptr, table,  # keys, values [B, H, m, D]; W_K, W_V [R, H D]; addresses [4, L]
    cos_ptr, sin_ptr, valid_ptr,          # [B, m or 1, HALF] float32; [B, m] uint8
    key_ptr, norm_ptr, w_ptr, u_ptr,      # delta: k, 1 / |k~|, w, u_0; sum: k~, -, -, v~. [L, B, m, R], [L, B, m]
    L, B, m, H, D,
    stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    stride_cb, stride_cm, stride_valid_b, stride_valid_m,
    R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_VALID: tl.constexpr, DELTA: tl.constexpr,
    TABLE: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    layer_row = tl.program_id(0).to(tl.int64)
    layer, row = layer_row // B, layer_row % B
    r = tl.arange(0, BR)
    first = tl.program_id(1) * BP
    tokens = first + tl.arange(0, BP)
    is_token = tokens < m
    if HAS_VALID:
        at = valid_ptr + row * stride_valid_b + tokens * stride_valid_m
        is_token = is_token & (tl.load(at, mask=is_token, other=0) != 0)
    k_base = layer_pointer(k_ptr, table, layer, TABLE) + row * stride_kb
    v_base = layer_pointer(v_ptr, table + L, layer, TABLE) + row * stride_vb
    wk_base = layer_pointer(wk_ptr, table + 2 * L, layer, TABLE)
    wv_base = layer_pointer(wv_ptr, table + 3 * L, layer, TABLE)
    cos_base, sin_base = cos_ptr + row * stride_cb, sin_ptr + row * stride_cb
    keys = tl.zeros([BP, BR], tl.float32)
    values = tl.zeros([BP, BR], tl.float32)
    for h in range(H):
        head = tl.cast(h, tl.int64)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            mask = is_token[:, None] & (d < D)[None, :]
            weight_at = r[None, :] * (H * D) + h * D + d[:, None]
            weight_mask = (d < D)[:, None] & (r < R)[None, :]
            k_head = k_base + head * stride_kh
            k = load_rotated(k_head, cos_base, sin_base, tokens, d, mask, stride_km, stride_cm, HALF, INTERLEAVED)
            w = tl.load(wk_base + weight_at, mask=weight_mask, other=0.0).to(tl.float32)
            keys = tl.dot(k, w, keys, input_precision=PRECISION)
            v = load_rotated(
                v_base + head * stride_vh, cos_base, sin_base, tokens, d, mask, stride_vm, stride_cm, 0, INTERLEAVED
            )
            w = tl.load(wv_base + weight_at, mask=weight_mask, other=0.0).to(tl.float32)
            values = tl.dot(v, w, values, input_precision=PRECISION)
    at = (layer_row * m + tokens)[:, None] * R + r[None, :]
    mask = (tokens < m)[:, None] & (r < R)[None, :]
    tl.store(key_ptr + at, keys, mask=mask)
    tl.store(u_ptr + at, values, mask=mask)
    if DELTA:
        tl.debug_barrier()  # the blocks below read what other threads have written
        n = tl.arange(0, BN)
        for start in range(0, tl.minimum(BP, m - first), BN):
            block = first + start + n
            out = layer_row * m + block
            block_at = out[:, None] * R + r[None, :]
            block_mask = (block < m)[:, None] & (r < R)[None, :]
            unit = tl.load(key_ptr + block_at, mask=block_mask, other=0.0)
            u = tl.load(u_ptr + block_at, mask=block_mask, other=0.0)
            inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(unit * unit, 1)), 1e-12)
            unit = unit * inverse[:, None]
            products = strict_lower_products(unit, BN, PRECISION)
            solved = unit
            for i in range(1, BN):  # forward substitution: row i needs the rows before it
                weights = tl.sum(tl.where((n == i)[:, None], products, 0.0), 0)[:, None]
                is_row = (n == i)[:, None]
                solved = tl.where(is_row, solved - tl.sum(weights * solved, 0)[None, :], solved)
                u = tl.where(is_row, u - tl.sum(weights * u, 0)[None, :], u)
            tl.debug_barrier()  # all threads have read the block that is overwritten here
            tl.store(norm_ptr + out, inverse, mask=block < m)
            tl.store(key_ptr + block_at, unit, mask=block_mask)
            tl.store(w_ptr + block_at, solved, mask=block_mask)
            tl.store(u_ptr + block_at, u, mask=block_mask)


@triton.jit
def update_kernel(
    key_ptr, w_ptr, u_ptr,           # as `project_kernel` leaves them
    core_ptr, new_ptr, saved_ptr,    # [L, B, R, R]; SAVE: the core before each block, [L, B, blocks, R, R]
    m,
    R: tl.constexpr, DELTA: tl.constexpr, SAVE: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    layer_row = tl.program_id(0).to(tl.int64)
    n, r = tl.arange(0, BN), tl.arange(0, BR)
    square = r[:, None] * R + r[None, :]
    square_mask = (r < R)[:, None] & (r < R)[None, :]
    core = tl.load(core_ptr + layer_row * R * R + square, mask=square_mask, other=0.0)
    for start in range(0, m, BN):
        at = (layer_row * m + start + n)[:, None] * R + r[None, :]
        mask = (start + n < m)[:, None] & (r < R)[None, :]
        k = tl.load(key_ptr + at, mask=mask, other=0.0)
        u = tl.load(u_ptr + at, mask=mask, other=0.0)
        if SAVE:
            block = layer_row * tl.cdiv(m, BN) + start // BN
            tl.store(saved_ptr + block * R * R + square, core, mask=square_mask)
        if DELTA:
            w = tl.load(w_ptr + at, mask=mask, other=0.0)
            u = u - tl.dot(w, core, input_precision=PRECISION)
        core += tl.dot(tl.trans(k), u, input_precision=PRECISION)
    tl.store(new_ptr + layer_row * R * R + square, core, mask=square_mask)


@triton.jit
def update_backward_kernel(
    key_ptr, w_ptr,                  # as `project_kernel` leaves them
    grad_ptr, core_grad_ptr,         # gradients of the core after and before, [L, B, R, R]
    saved_grad_ptr,                  # gradient of the core after each block, [L, B, blocks, R, R]
    m,
    R: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The blocks in reverse (delta rule): dM <- dM - w^T (K dM)."""
    layer_row = tl.program_id(0).to(tl.int64)
    n, r = tl.arange(0, BN), tl.arange(0, BR)
    square = r[:, None] * R + r[None, :]
    square_mask = (r < R)[:, None] & (r < R)[None, :]
    grad = tl.load(grad_ptr + layer_row * R * R + square, mask=square_mask, other=0.0)
    num_blocks = tl.cdiv(m, BN)
    for i in range(num_blocks):
        block = num_blocks - 1 - i
        tokens = block * BN + n
        at = (layer_row * m + tokens)[:, None] * R + r[None, :]
        mask = (tokens < m)[:, None] & (r < R)[None, :]
        tl.store(saved_grad_ptr + (layer_row * num_blocks + block) * R * R + square, grad, mask=square_mask)
        k = tl.load(key_ptr + at, mask=mask, other=0.0)
        w = tl.load(w_ptr + at, mask=mask, other=0.0)
        u_grad = tl.dot(k, grad, input_precision=PRECISION)
        grad -= tl.dot(tl.trans(w), u_grad, input_precision=PRECISION)
    tl.store(core_grad_ptr + layer_row * R * R + square, grad, mask=square_mask)


@triton.jit
def block_backward_kernel(
    key_ptr, norm_ptr, w_ptr, u_ptr,     # as `project_kernel` leaves them
    saved_ptr, grad_ptr,                 # delta: cores before and gradients after each block; sum: -, [L, B, R, R]
    key_grad_ptr, value_grad_ptr,        # gradients of the projections k~ and v~, [L, B, m, R]
    m,
    R: tl.constexpr, DELTA: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    layer_row = tl.program_id(0).to(tl.int64)
    n, r = tl.arange(0, BN), tl.arange(0, BR)
    tokens = tl.program_id(1) * BN + n
    at = (layer_row * m + tokens)[:, None] * R + r[None, :]
    mask = (tokens < m)[:, None] & (r < R)[None, :]
    square = r[:, None] * R + r[None, :]
    square_mask = (r < R)[:, None] & (r < R)[None, :]
    k = tl.load(key_ptr + at, mask=mask, other=0.0)
    u = tl.load(u_ptr + at, mask=mask, other=0.0)
    if DELTA:
        block = (layer_row * tl.num_programs(1) + tl.program_id(1)) * R * R + square
        grad = tl.load(grad_ptr + block, mask=square_mask, other=0.0)
        core = tl.load(saved_ptr + block, mask=square_mask, other=0.0)
        w = tl.load(w_ptr + at, mask=mask, other=0.0)
        u = u - tl.dot(w, core, input_precision=PRECISION)
        # b = (I + N)^-T du, by back substitution: row i needs the rows after it.
        b = tl.dot(k, grad, input_precision=PRECISION)
        products = strict_lower_products(k, BN, PRECISION)
        for step in range(1, BN):
            i = BN - 1 - step
            weights = tl.sum(tl.where((n == i)[None, :], products, 0.0), 1)[:, None]
            b = tl.where((n == i)[:, None], b - tl.sum(weights * b, 0)[None, :], b)
        lower = tl.where(n[:, None] > n[None, :], -tl.dot(b, tl.trans(u), input_precision=PRECISION), 0.0)
        unit_grad = tl.dot(u, tl.trans(grad), input_precision=PRECISION)
        unit_grad -= tl.dot(b, tl.trans(core), input_precision=PRECISION)
        unit_grad += tl.dot(lower + tl.trans(lower), k, input_precision=PRECISION)
        inverse = tl.load(norm_ptr + layer_row * m + tokens, mask=tokens < m, other=0.0)
        key_grad = (unit_grad - k * tl.sum(unit_grad * k, 1)[:, None]) * inverse[:, None]
        value_grad = b
    else:
        grad = tl.load(grad_ptr + layer_row * R * R + square, mask=square_mask, other=0.0)
        key_grad = tl.dot(u, tl.trans(grad), input_precision=PRECISION)
        value_grad = tl.dot(k, grad, input_precision=PRECISION)
    tl.store(key_grad_ptr + at, key_grad, mask=mask)
    tl.store(value_grad_ptr + at, value_grad, mask=mask)


@triton.jit
def project_backward_kernel(
    x_ptr, weight_ptr, table,            # keys or values [B, H, m, D]; W [R, H D]; addresses [2, L]
    cos_ptr, sin_ptr, valid_ptr,
    out_grad_ptr,                        # gradient of the projection, [L, B, m, R]
    x_grad_ptr, weight_grad_ptr,         # [L, B, H, m, D]; a part for each row, [L, B, R, H D] float32
    L, B, m, H, D,
    stride_xb, stride_xh, stride_xm, stride_cb, stride_cm, stride_valid_b, stride_valid_m,
    R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_VALID: tl.constexpr,
    X_GRAD: tl.constexpr, TABLE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    layer_row = tl.program_id(0).to(tl.int64)
    layer, row = layer_row // B, layer_row % B
    num_chunks = tl.cdiv(D, BD)
    h, d0 = (tl.program_id(1) // num_chunks).to(tl.int64), (tl.program_id(1) % num_chunks) * BD
    n, r, d = tl.arange(0, BN), tl.arange(0, BR), d0 + tl.arange(0, BD)
    base = layer_pointer(x_ptr, table, layer, TABLE) + row * stride_xb + h * stride_xh
    weight_base = layer_pointer(weight_ptr, table + L, layer, TABLE) + h * D
    weight_at = r[:, None] * (H * D)
    weight_mask = (r < R)[:, None] & (d < D)[None, :]
    w = tl.load(weight_base + weight_at + d[None, :], mask=weight_mask, other=0.0).to(tl.float32)
    cos_base, sin_base = cos_ptr + row * stride_cb, sin_ptr + row * stride_cb
    weight_grad = tl.zeros([BR, BD], tl.float32)
    for start in range(0, m, BN):
        tokens = start + n
        is_token = tokens < m
        if HAS_VALID:
            at = valid_ptr + row * stride_valid_b + tokens * stride_valid_m
            is_token = is_token & (tl.load(at, mask=is_token, other=0) != 0)
        mask = is_token[:, None] & (d < D)[None, :]
        x = load_rotated(base, cos_base, sin_base, tokens, d, mask, stride_xm, stride_cm, HALF, INTERLEAVED)
        out_at = (layer_row * m + tokens)[:, None] * R + r[None, :]
        out_grad = tl.load(out_grad_ptr + out_at, mask=is_token[:, None] & (r < R)[None, :], other=0.0)
        weight_grad = tl.dot(tl.trans(out_grad), x, weight_grad, input_precision=PRECISION)
        if X_GRAD:
            x_grad = tl.dot(out_grad, w, input_precision=PRECISION)
            if HALF > 0:  # the transposed rotation
                angle, partner, sign = rotation_partner(d, HALF, INTERLEAVED)
                w_partner = tl.load(weight_base + weight_at + partner[None, :], mask=weight_mask, other=0.0).to(
                    tl.float32
                )
                turned = mask & (d < 2 * HALF)[None, :]
                at = tokens[:, None] * stride_cm + angle[None, :]
                cos = tl.load(cos_base + at, mask=turned, other=1.0)
                sin = tl.load(sin_base + at, mask=turned, other=0.0)
                y_grad = tl.dot(out_grad, w_partner, input_precision=PRECISION)
                x_grad = x_grad * cos - y_grad * sin * sign[None, :]
            at = (layer_row * H + h) * m * D + tokens[:, None] * D + d[None, :]
            tl.store(
                x_grad_ptr + at,
                x_grad.to(x_grad_ptr.dtype.element_ty),
                mask=(tokens < m)[:, None] & (d < D)[None, :],
            )
    at = layer_row * R * H * D + r[:, None] * (H * D) + h * D + d[None, :]
    tl.store(weight_grad_ptr + at, weight_grad, mask=weight_mask)
