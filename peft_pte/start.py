"""How an adapter starts with `init_weights="attention"`: its states are asked as the base's attention asks keys.

A query q = W_q x meets a key k = W_k y in the product q k, which is x^T (W_q^T W_k) y without their positions. Of this
form the r strongest pairs of directions are taken (a truncated singular value decomposition): tokens are then written
under what the base looks for in their keys, and asked for by what it looks for them with.
"""

from __future__ import annotations

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from .encoder import ENCODER_NAME
from .families import FUSED_PROJECTION, kv_width
from .layer import Linear, base_layer_of, is_sharded_tensor


def attention_start(queries: torch.Tensor, keys: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """P [r, in] and W [r, d_kv] such that P x and W k have, of all pairs of rank r, inner products nearest to q k.

    Args:
        queries, keys: W_q and W_k, [d_kv, in], of heads that belong to each other, so that the form is W_q^T W_k.
        rank: r. Where d_kv is smaller, the remaining rows are zero.
    """

    def root_and_inverse(weight: torch.Tensor) -> list[torch.Tensor]:
        """Of W W^T: its square root, and the inverse of that where it has one."""
        values, vectors = torch.linalg.eigh(weight @ weight.mT)
        smallest = values.max() * 1e-6
        powers = (torch.where(values > smallest, values.clamp(min=smallest) ** p, 0.0) for p in (0.5, -0.5))
        return [(vectors * power) @ vectors.mT for power in powers]

    # In coordinates in which both sides are white, [d_kv, d_kv] instead of [in, in].
    (of_queries, white_queries), (of_keys, white_keys) = map(root_and_inverse, (queries, keys))
    left, strengths, right = torch.linalg.svd(of_queries @ of_keys)
    count = min(rank, len(strengths))
    roots = strengths[:count, None].sqrt()
    asks, writes = queries.new_zeros(rank, queries.shape[1]), keys.new_zeros(rank, len(keys))
    asks[:count] = roots * (left[:, :count].mT @ white_queries @ queries)
    writes[:count] = roots * (right[:count] @ white_keys)
    return asks, writes


def weight_of(projection: nn.Module) -> torch.Tensor | None:
    """The weight [out, in] of a projection in float32 or float64, dequantised; None if it cannot be read here."""
    layer = base_layer_of(projection)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.is_meta or is_sharded_tensor(weight):
        return None
    is_plain = type(weight) in (torch.Tensor, nn.Parameter)
    if not is_plain or not weight.is_floating_point():
        try:  # torchao and quanto have tensors of their own, bitsandbytes packs into integers
            weight = weight.dequantize() if weight.is_floating_point() else dequantize_module_weight(layer)
        except (TypeError, ImportError, AttributeError, NotImplementedError, RuntimeError):
            return None
    if weight.dim() != 2 or not weight.is_floating_point():
        return None
    weight = weight.detach()
    return weight if weight.dtype == torch.float64 else weight.float()


def query_and_key_weights(attention: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """W_q, the mean over the query heads of each key head, and W_k, both [d_kv, in]; None if they cannot be read."""
    d_kv = kv_width(attention)
    if hasattr(attention, FUSED_PROJECTION):
        weight = weight_of(getattr(attention, FUSED_PROJECTION))
        if weight is None or len(weight) <= 2 * d_kv:
            return None
        queries, keys, _ = weight.split([len(weight) - 2 * d_kv, d_kv, d_kv])
    else:
        queries, keys = weight_of(attention.q_proj), weight_of(attention.k_proj)
        if queries is None or keys is None or len(keys) != d_kv:
            return None
    num_heads = getattr(attention.config, "num_key_value_heads", None) or attention.config.num_attention_heads
    head_dim = d_kv // num_heads
    if len(queries) % d_kv:
        return None
    return queries.unflatten(0, (num_heads, -1, head_dim)).mean(1).flatten(0, 1), keys


@torch.no_grad()
def start_as_attention(attention: nn.Module, output_projection: Linear, name: str, refuse: bool) -> None:
    """Let `B` of one layer's output projection, W_K and Q start so; Q = W_Q q_g becomes a multiple of the identity.

    All keep the norms that they have. Nothing is done where parameters are on `meta`: they are about to be loaded.

    Raises:
        ValueError: the base's weights cannot be read, and `refuse`.
    """
    encoder = getattr(attention, ENCODER_NAME)
    query = encoder.pte_query[name].weight
    targets = output_projection.pte_B[name].weight, encoder.pte_key[name].weight, encoder.pte_query_tokens[name].weight
    if any(target.is_meta for target in targets):
        return
    weights = query_and_key_weights(attention)
    if weights is None:
        if refuse:
            raise ValueError(
                "PTEConfig: `init_weights` is 'attention', but the weights of the query and key projections of layer "
                f"{attention.layer_idx} cannot be read here (sharded, on `meta`, or quantised in a way that PEFT does "
                "not take back): use init_weights=True."
            )
        return
    asks, writes = attention_start(*weights, encoder.pte_rule[name].r)
    # Turned, which changes no inner product: else the strongest pair's rows are long, and Adam's steps small for them.
    turn = torch.linalg.qr(torch.randn(len(asks), len(asks), dtype=asks.dtype, device=asks.device)).Q
    asks, writes = turn @ asks, turn @ writes
    tokens = torch.linalg.pinv(query.to(asks.dtype)).mT
    for target, start in zip(targets, (asks, writes, tokens)):
        norm = target.to(asks.dtype).norm()
        target.copy_(start.to(target.device) * (norm / start.norm().to(target.device).clamp(min=1e-12)))
