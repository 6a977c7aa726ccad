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
def slots_of(valid_base, stride, tokens, m, before, HAS_VALID: tl.constexpr):
    """Which of a block's tokens are encoded, and their slots: how many of the row are encoded before each of them, with
    `before` in front of the block."""
    is_token = tokens < m
    slots = tokens
    if HAS_VALID:
        is_token = is_token & (tl.load(valid_base + tokens * stride, mask=is_token, other=0) != 0)
        ones = is_token.to(tl.int32)
        slots = before + tl.cumsum(ones, 0) - ones
    return is_token, slots


@triton.jit
def tap_pointer(pointer, table, layer, L, C: tl.constexpr, GATE: tl.constexpr, TABLE: tl.constexpr):
    """The weights of a layer's convolution, [C - 1, R], with the gate of writes under them, if there are any."""
    if C > 1 or GATE:
        pointer = layer_pointer(pointer, table + 4 * L, layer, TABLE)
    return pointer


@triton.jit
def load_tap(taps, j, r, R: tl.constexpr):
    """What the key `j` tokens before is weighted with, [1, BR]."""
    return tl.load(taps + (j - 1) * R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_keys(known, taps, slots, count, r, R: tl.constexpr, C: tl.constexpr):
    """Convolved keys of a block, [BN, BR]; `known`: the row's projected keys, behind the C - 1 that came before."""
    mask = (slots < count)[:, None] & (r < R)[None, :]
    at = (slots + C - 1)[:, None] * R + r[None, :]
    keys = tl.load(known + at, mask=mask, other=0.0)
    for j in range(1, C):
        keys += load_tap(taps, j, r, R) * tl.load(known + at - j * R, mask=mask, other=0.0)
    return keys


@triton.jit
def inverse_norms(keys):
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(keys * keys, 1)), 1e-12)[:, None]


@triton.jit
def openness(keys, taps, r, R: tl.constexpr, C: tl.constexpr):
    """sigmoid(g k) of the convolved keys of a block, [BN]: each is written with the strength beta = 2 sigmoid(g k)."""
    return tl.sigmoid(tl.sum(keys * load_tap(taps, C, r, R), 1))


@triton.jit
def written_keys(keys, taps, r, R: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr):
    """What the delta rule has for the convolved keys [BN, BR], unit keys times sqrt(beta), and sqrt(beta) [BN]."""
    factors = inverse_norms(keys)
    root = tl.full([keys.shape[0]], 1.0, tl.float32)
    if GATE:
        root = tl.sqrt(2 * openness(keys, taps, r, R, C))
        factors = factors * root[:, None]
    return keys * factors, root


@triton.jit
def solved(k, BN: tl.constexpr, PRECISION: tl.constexpr):
    """(I + N)^-1 with N = strict_lower(K K^T), [BN, BN], by forward substitution: row i needs the rows before it."""
    n = tl.arange(0, BN)
    products = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    products = tl.where(n[:, None] < n[None, :], products, 0.0)  # N^T, whose columns are side by side in a thread
    inverse = tl.where(n[:, None] == n[None, :], 1.0, 0.0)
    for i in range(1, BN):
        weights = tl.sum(tl.where((n == i)[None, :], products, 0.0), 1)[:, None]
        inverse = tl.where((n == i)[:, None], inverse - tl.sum(weights * inverse, 0)[None, :], inverse)
    return inverse


@triton.jit
def project_kernel(
    k_ptr, v_ptr, wk_ptr, wv_ptr, table,  # keys, values [B, H, m, D]; W_K, W_V [R, H D]; addresses [4 or 5, L]
    cos_ptr, sin_ptr, valid_ptr,          # [B, m or 1, HALF] float32; [B, m] uint8
    core_ptr,                             # [L, B, R + C - 1, R]
    known_ptr, value_ptr, count_ptr,      # [L, B, C - 1 + m, R], [L, B, m, R], [L, B]: how many tokens are encoded
    L, B, m, H, D,
    stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    stride_cb, stride_cm, stride_valid_b, stride_valid_m,
    R: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_VALID: tl.constexpr,
    TABLE: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    layer_row = tl.program_id(0).to(tl.int64)
    layer, row = layer_row // B, layer_row % B
    r = tl.arange(0, BR)
    first = tl.program_id(1) * BP
    tokens = first + tl.arange(0, BP)
    valid_base = valid_ptr + row * stride_valid_b
    before = first
    if HAS_VALID:
        before = 0
        for start in range(0, first, BP):
            valid = tl.load(valid_base + (start + tl.arange(0, BP)) * stride_valid_m)
            before += tl.sum((valid != 0).to(tl.int32), 0)
    is_token, slots = slots_of(valid_base, stride_valid_m, tokens, m, before, HAS_VALID)
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
    known = known_ptr + layer_row * (C - 1 + m) * R
    mask = is_token[:, None] & (r < R)[None, :]
    at = slots[:, None] * R + r[None, :]
    tl.store(known + (C - 1) * R + at, keys, mask=mask)
    tl.store(value_ptr + layer_row * m * R + at, values, mask=mask)
    if tl.program_id(1) == tl.num_programs(1) - 1:
        tl.store(count_ptr + layer_row, before + tl.sum(is_token.to(tl.int32), 0))
    if C > 1 and tl.program_id(1) == 0:
        for i in range(C - 1):
            key = tl.load(core_ptr + (layer_row * (R + C - 1) + R + i) * R + r, mask=r < R, other=0.0)
            tl.store(known + i * R + r, key, mask=r < R)


@triton.jit
def update_kernel(
    known_ptr, value_ptr, count_ptr, table,  # as `project_kernel` leaves them; addresses [5, L]
    taps_ptr, core_ptr, new_ptr,             # [C - 1 + GATE, R]; [L, B, R + C - 1, R]
    saved_ptr, inverse_ptr,                  # SAVE: the core before each block, [L, B, blocks, R, R], and (I + N)^-1
    L, B, m,
    R: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr, SAVE: tl.constexpr, TABLE: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    layer_row = tl.program_id(0).to(tl.int64)
    n, r = tl.arange(0, BN), tl.arange(0, BR)
    square = r[:, None] * R + r[None, :]
    square_mask = (r < R)[:, None] & (r < R)[None, :]
    taps = tap_pointer(taps_ptr, table, layer_row // B, L, C, GATE, TABLE)
    known, values = known_ptr + layer_row * (C - 1 + m) * R, value_ptr + layer_row * m * R
    count = tl.load(count_ptr + layer_row)
    core = tl.load(core_ptr + layer_row * (R + C - 1) * R + square, mask=square_mask, other=0.0)
    for start in range(0, count, BN):
        slots = start + n
        k = load_keys(known, taps, slots, count, r, R, C)
        # Transposed, so that warps share the rows of M^T. Of K M they would share those of K, and each hold all of M.
        mask = (r < R)[:, None] & (slots < count)[None, :]
        u = tl.load(values + slots[None, :] * R + r[:, None], mask=mask, other=0.0)
        if DELTA:
            k, root = written_keys(k, taps, r, R, C, GATE)
            if GATE:
                u = u * root[None, :]
            inverse = solved(k, BN, PRECISION)
            u -= tl.dot(tl.trans(core), tl.trans(k), input_precision=PRECISION)
            u = tl.dot(u, tl.trans(inverse), input_precision=PRECISION)
            if SAVE:
                block = layer_row * tl.cdiv(m, BN) + start // BN
                tl.store(saved_ptr + block * R * R + square, core, mask=square_mask)
                tl.store(inverse_ptr + block * BN * BN + n[:, None] * BN + n[None, :], inverse)
        core += tl.dot(tl.trans(k), tl.trans(u), input_precision=PRECISION)
    new = new_ptr + layer_row * (R + C - 1) * R
    tl.store(new + square, core, mask=square_mask)
    for i in range(C - 1):  # of the old keys and these, the last C - 1
        key = tl.load(known + (count + i) * R + r, mask=r < R, other=0.0)
        tl.store(new + (R + i) * R + r, key, mask=r < R)
