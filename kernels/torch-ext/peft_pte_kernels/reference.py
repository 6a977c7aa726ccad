"""Every op in plain PyTorch: what the method is, the CPU path, and the only thing that kernels are compared with.

Equations are those of the paper (arXiv 2602.16839). Shapes: L layers, B rows of a batch, H key/value heads, m tokens
that leave the cache at once, D = head_dim, r the rank. A core M is [B, r, r] and starts at zero; a state S is [B, r, r]
and acts as `dW = A S B` (Eq. 5). With a convolution over c tokens the last c - 1 projected keys are carried with the
core, as rows under it: [B, r + c - 1, r]. Its weights ("taps") are [c - 1, r]; with a gate of writes (delta rule) that
is one row more, [c, r]. Cores and states are float32, or float64 in float64 models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

# The delta rule is solved in blocks of this many tokens: quadratic inside a block, linear across blocks.
DELTA_BLOCK = 64
# Rows of what was written stay shorter than this with the norm "bound". Rows have norms of 1 to 1.5 while a few facts
# are stored (values of about unit norm under orthogonal keys), so that it acts where more than that comes together.
ROW_BOUND = 2.0


class Rotation(NamedTuple):
    """How to rotate keys: `cos` and `sin` [B, m or 1, rotary_dim / 2]; the rest of a head is left as it is.

    The i-th angle turns the pair (i, i + rotary_dim / 2), or (2 i, 2 i + 1) if `interleaved`. To take a rotary position
    out, the tables are those of the negative angle.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    def apply(self, keys: torch.Tensor) -> torch.Tensor:
        """Rotate `keys` [B, H, m, D]."""
        half = self.cos.shape[-1]
        rotated, rest = keys[..., : 2 * half], keys[..., 2 * half :]
        first, second = (rotated[..., ::2], rotated[..., 1::2]) if self.interleaved else rotated.split(half, dim=-1)
        cos, sin = (table[:, None].to(keys.dtype) for table in (self.cos, self.sin))
        pair = first * cos - second * sin, second * cos + first * sin
        turned = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        return torch.cat([turned, rest], dim=-1)


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Scale the last dimension to unit L2 norm; rows of zeros stay zero."""
    return F.normalize(x, dim=-1, eps=1e-12)


def normalize_state(state: torch.Tensor, norm_type: str) -> torch.Tensor:
    """Normalize of Eq. 4, [..., r, r]: unit rows, or (Frobenius) a unit root-mean-square row norm."""
    if norm_type == "row":
        return unit_rows(state)
    norm = torch.linalg.matrix_norm(state, keepdim=True).clamp(min=1e-12)
    return state * (state.shape[-1] ** 0.5 / norm)


def bound_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows x to x / sqrt(1 + |x|^2 / ROW_BOUND^2): short ones as they are, long ones shorter than ROW_BOUND."""
    return x * (1 + x.square().sum(-1, keepdim=True) / ROW_BOUND**2).rsqrt()


def sum_update(
    core: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """The core of Eq. 3 and 4: M <- M + K~^T V~. `keys`, `values` [B, m, r]; `valid` [B, m], False: not encoded."""
    if valid is not None:
        keys = keys.masked_fill(~valid[..., None], 0.0)
        values = values.masked_fill(~valid[..., None], 0.0)
    return core + keys.mT @ values


def delta_update(
    core: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor | None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """The delta rule, token by token M <- M + k (v - M^T k)^T with unit keys k, in its exact chunk-parallel form.

    With u_i = v_i - M_{i-1}^T k_i, and M_{i-1} = M_0 + sum_{j<i} k_j u_j^T, the u of a block solve the unit lower
    triangular system (I + strict_lower(K K^T)) U = V - K M_0, and M = M_0 + K^T U. Masked tokens have k = u = 0, and
    so change nothing. Shapes as in `sum_update`.

    `gate`: g [r]. Each token is then written as far as its key k says before it has unit length, with the strength
    beta = 2 sigmoid(g k), in (0, 2): M <- M + beta k (v - M^T k)^T. That is the rule for sqrt(beta) k and sqrt(beta) v.
    """
    units = unit_rows(keys)
    if gate is not None:
        root = (2 * torch.sigmoid(keys @ gate))[..., None].sqrt()
        units, values = units * root, values * root
    keys = units
    if valid is not None:
        keys = keys.masked_fill(~valid[..., None], 0.0)
        values = values.masked_fill(~valid[..., None], 0.0)
    for k, v in zip(keys.split(DELTA_BLOCK, dim=-2), values.split(DELTA_BLOCK, dim=-2)):
        # solve_triangular reads only the strict lower part when the diagonal is declared to be one.
        u = torch.linalg.solve_triangular(k @ k.mT, v - k @ core, upper=False, unitriangular=True)
        core = core + k.mT @ u
    return core


UPDATES = {"sum": sum_update, "delta": delta_update}


def convolve(
    keys: torch.Tensor, before: torch.Tensor, taps: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The short causal convolution of keys: k_t + sum_j taps[j - 1] k_{t-j} per channel, over tokens that are encoded.

    Args:
        keys: [B, m, r]. before: the keys before them, [B, c - 1, r], zero where there were none. taps: [c - 1, r].
        valid: [B, m], None or True first and then False in every row (see `in_front`).

    Returns:
        The sums [B, m, r], and the last c - 1 keys [B, c - 1, r].
    """
    m, size = keys.shape[1], len(taps)
    known = torch.cat([before, keys], dim=1)
    sums = keys
    for j, tap in enumerate(taps, start=1):
        sums = torch.addcmul(sums, tap, known[:, size - j : size - j + m])
    if valid is None:
        return sums, known[:, m:]
    last = valid.sum(1)[:, None] + torch.arange(size, device=valid.device)
    return sums, known.gather(1, last[..., None].expand(-1, -1, keys.shape[-1]))


def in_front(
    keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring the valid tokens of every row to its front, in their order: keys and values [B, m, r], valid [B, m]."""
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    valid, index = valid.gather(1, order), order[..., None].expand_as(keys)
    return *(x.gather(1, index).masked_fill(~valid[..., None], 0.0) for x in (keys, values)), valid


def write(
    update: str,
    core: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor | None,
    taps: torch.Tensor | None,
) -> torch.Tensor:
    """Write projected keys and values [B, m, r] into the core, with the last keys under it: [B, r + c - 1, r].

    `taps`: [c - 1, r] of the convolution, with a gate of writes [c, r]; None: c = 1 and no gate.
    """
    if taps is None:
        return UPDATES[update](core, keys, values, valid)
    r = core.shape[-1]
    taps, gate = taps.split([core.shape[1] - r, r + len(taps) - core.shape[1]])
    if valid is not None:
        keys, values, valid = in_front(keys, values, valid.expand(len(core), -1))
    keys, last = convolve(keys, core[:, r:], taps, valid)
    gated = (gate[0],) if len(gate) else ()
    return torch.cat([UPDATES[update](core[:, :r], keys, values, valid, *gated), last], dim=1)


def encode(
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    key_weights: list[torch.Tensor],
    value_weights: list[torch.Tensor],
    cores: torch.Tensor,
    update: str,
    rotation: Rotation | None = None,
    valid: torch.Tensor | None = None,
    taps: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Write what leaves the cache into the cores of all layers: [L, B, r + c - 1, r] -> [L, B, r + c - 1, r].

    Args:
        keys, values: of each layer, [B, H, m, D], any strides.
        key_weights, value_weights: W_K and W_V of each layer, [r, H D].
        cores: [L, B, r + c - 1, r]. update: `"sum"` (Eq. 3) or `"delta"`.
        rotation: takes the rotary position out of the keys. valid: [B, m], False: not encoded.
        taps: of the convolution of keys in each layer, [c - 1, r]; [c, r] with the gate of writes; None: c = 1 and no
            gate.
    """
    written = []
    for layer, (k, v, key_weight, value_weight, core) in enumerate(
        zip(keys, values, key_weights, value_weights, cores)
    ):
        k, v = k.to(cores.dtype), v.to(cores.dtype)
        k = k if rotation is None else rotation.apply(k)
        k, v = (
            x.transpose(1, 2).flatten(2) @ weight.to(cores.dtype).mT
            for x, weight in ((k, key_weight), (v, value_weight))
        )
        written.append(write(update, core, k, v, valid, None if taps is None else taps[layer].to(cores.dtype)))
    return torch.stack(written)


def read_state(
    cores: torch.Tensor, query: torch.Tensor, initial: torch.Tensor, transposed: bool, norm: str
) -> torch.Tensor:
    """The states that projections use: normalize(S_0 + Q M), or with (Q M)^T if `transposed`.

    With the norm `"bound"`, the rows of what is added to S_0 are bounded, and S_0 stays as it is.

    Args:
        cores: M, [L, B, r, r]. query: Q, [L, r, r]. initial: S_0, [L, 1 or B, r, r].
        norm: `"none"`, `"bound"`, `"row"` or `"frobenius"`.
    """
    added = query[:, None] @ cores
    added = added.mT if transposed else added
    if norm == "bound":
        return initial + bound_rows(added)
    states = initial + added
    return states if norm == "none" else normalize_state(states, norm)


def compact(slots: list[torch.Tensor], start: int, count: int, length: int) -> None:
    """Close the gap of the `count` slots from `start` on, in place: slots up to `length` move down.

    `slots`: keys and values of all layers, each [B, H, capacity, D]. What lies behind `length - count` afterwards has
    no meaning.
    """
    for buffer in slots:
        buffer[..., start : length - count, :] = buffer[..., start + count : length, :].clone()


def low_rank_update(
    x: torch.Tensor,
    bases: list[torch.Tensor],
    state: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: float,
    gate: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """y + scaling * A S B x (Eq. 5) for projections of the same input.

    Args:
        x: [B, T, in]. bases: y = W x of each projection, [B, T, out].
        state: S, [B, r, r]. A: [out, r] and B: [r, in] of each projection.
        gate: G, [r, in], of a single projection: y + scaling * A (2 sigmoid(G x) * S B x), `*` by element.

    Returns:
        Of each projection [B, T, out], in the dtype of its base.
    """
    results = []
    for base, a, b in zip(bases, A, B):
        z = x.to(b.dtype) @ b.mT
        z = z @ state.to(z.dtype).mT
        if gate is not None:
            z = z * (2 * torch.sigmoid(x.to(gate.dtype) @ gate.mT))
        results.append(base + (z @ a.mT * scaling).to(base.dtype))
    return results


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of `targets` [...] under softmax(`logits` [..., vocab] / temperature), and its entropy.

    Both float32 (float64 for float64 logits); the entropy carries no gradient.
    """
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32) / temperature
    normalizer = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[..., None])[..., 0] - normalizer
    with torch.no_grad():
        entropy = torch.special.entr((logits - normalizer[..., None]).exp()).sum(-1)  # 0 for logits of -inf
    return logprobs, entropy


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of one new token over the slots `first <= slot < length`, with `first` and `length` on the device.

    Args:
        query: [B, H_q, 1, D], H_q a multiple of H. keys, values: [B, H, capacity, D].
        first: [B], int32, the row's first slot that holds a token. length: [1], int32, slots in use.

    Returns:
        [B, H_q, 1, D] in the query's dtype.
    """
    groups = query.shape[1] // keys.shape[1]
    slots = torch.arange(keys.shape[2], device=keys.device)
    seen = (slots >= first[:, None]) & (slots < length)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    k, v = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (keys, values))
    v = v.masked_fill(~seen[:, None, :, None], 0.0)  # slots not in use may hold anything
    scores = (query.to(dtype) @ k.mT * scaling).masked_fill(~seen[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ v).to(query.dtype)
