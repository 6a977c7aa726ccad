"""`init_weights="attention"`: an adapter that starts from the directions in which the base's attention looks."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from models import FAMILIES, relative_error, tiny_model, with_adapter
from peft import PeftModel, get_peft_model
from torch import nn

from peft_pte import PTEConfig, start
from peft_pte.families import attention_modules, find_decoder
from peft_pte.layer import base_layer_of
from peft_pte.start import attention_start, query_and_key_weights, weight_of


@pytest.mark.parametrize("d_kv, width, rank", [(8, 20, 3), (12, 12, 5), (24, 16, 6), (8, 20, 8), (4, 16, 7)])
def test_no_pairs_of_this_rank_are_nearer(d_kv: int, width: int, rank: int) -> None:
    """The form of rank r is the truncated singular value decomposition of W_q^T W_k, also of singular weights."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, d_kv, width, generator=generator, dtype=torch.float64)
    keys[-1] = keys[0]  # two channels alike
    asks, writes = attention_start(queries, keys, rank)
    assert asks.shape == (rank, width) and writes.shape == (rank, d_kv)
    left, strengths, right = torch.linalg.svd(queries.mT @ keys)
    count = min(rank, d_kv)
    expected = (left[:, :count] * strengths[:count]) @ right[:count]
    assert relative_error(asks.mT @ (writes @ keys), expected) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_asked_as_attention_asks_keys(family: str) -> None:
    """In every family: what q and k of the base give, from its own projections; the rest starts as with True."""
    base = tiny_model(family)
    options = dict(task_type="CAUSAL_LM", window_size=6, r=4, num_global_tokens=2, write_gate=True)
    get_peft_model(base, PTEConfig(init_weights="attention", **options))
    for attention in attention_modules(find_decoder(base)).values():
        encoder, name = attention.thought_encoder, "default"
        output = next(m for m in attention.children() if getattr(m, "hidden_size", None) is not None)
        x = torch.randn(5, output.hidden_size, dtype=torch.float64)
        if hasattr(attention, "qkv_proj"):
            projected = base_layer_of(attention.qkv_proj).weight
            queries, keys, _ = projected.split([len(projected) - 2 * encoder.d_kv, encoder.d_kv, encoder.d_kv])
        else:
            queries, keys = (base_layer_of(p).weight for p in (attention.q_proj, attention.k_proj))
        head_dim = attention.head_dim
        groups = queries.view(encoder.d_kv // head_dim, -1, head_dim, queries.shape[1])
        mean = groups.sum(1).flatten(0, 1) / groups.shape[1]
        left, strengths, right = torch.linalg.svd(mean.mT @ keys)
        form = (left[:, :4] * strengths[:4]) @ right[:4]
        asked = output.pte_B[name](x) @ (encoder.pte_key[name].weight @ keys @ x.mT)
        assert abs(nn.functional.cosine_similarity(asked.flatten(), (x @ form @ x.mT).flatten(), dim=0) - 1) <= 1e-6
        query = encoder.query(name)
        assert relative_error(query / query[0, 0], torch.eye(4, dtype=torch.float64)) <= 1e-6
        assert not output.pte_A[name].weight.any() and not encoder.pte_key_conv[name].weight.any()


def test_it_starts_as_the_base_and_learns() -> None:
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    plain = with_adapter(tiny_model("llama"), window_size=6, init_weights=True)
    model = with_adapter(tiny_model("llama"), window_size=6, init_weights="attention")
    outputs = [m(input_ids=ids, labels=ids, prompt_lengths=2) for m in (plain, model)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    outputs[1].loss.backward()
    assert all(
        p.grad is not None and p.grad.any() for n, p in model.named_parameters() if p.requires_grad and "pte_A" in n
    )


def test_a_saved_adapter_is_what_it_was(tmp_path: Path) -> None:
    """Loading does not start anew, nor ask for the base's weights."""
    model = with_adapter(tiny_model("llama"), window_size=6, init_weights="attention")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model.save_pretrained(tmp_path)
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        with patch.object(start, "attention_start", wraps=start.attention_start) as made:
            loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, **options)
        assert made.called == ("is_trainable" in options)  # it takes a while for large models
        expected = {n: p for n, p in model.named_parameters() if "pte_" in n}
        assert all(torch.equal(p, expected[n]) for n, p in loaded.named_parameters() if "pte_" in n)


class Packed(torch.Tensor):
    """A weight as some quantisers have them: a tensor of a class of its own, that can be taken back."""

    def dequantize(self) -> torch.Tensor:
        return 2 * self.as_subclass(torch.Tensor)


def test_quantised_weights_are_taken_back() -> None:
    layer = nn.Linear(3, 4, dtype=torch.float64)
    plain = layer.weight.detach()
    layer.weight = nn.Parameter(plain.as_subclass(Packed))
    assert type(layer.weight) is Packed and torch.equal(weight_of(layer), 2 * plain)
    layer.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert weight_of(layer) is None


def test_weights_that_cannot_be_read_are_refused() -> None:
    base = tiny_model("llama")
    base.model.layers[1].self_attn.k_proj.weight = nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)
    base.model.layers[1].self_attn.k_proj.forward = lambda x: x
    assert query_and_key_weights(base.model.layers[1].self_attn) is None
    with pytest.raises(ValueError, match="`init_weights` is 'attention', but the weights of the query and key"):
        with_adapter(base, init_weights="attention")
    with pytest.raises(ValueError, match="`init_weights` is 'attention', which is how an output projection starts"):
        with_adapter(tiny_model("llama"), init_weights="attention", target_modules=["q_proj"])
