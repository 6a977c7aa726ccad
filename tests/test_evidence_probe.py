"""The memory that is probed is the one that a layer has in the model."""

from __future__ import annotations

import pytest
import torch
from models import relative_error, tiny_model, with_adapter

import probe
from notes import NOTE
from peft_pte.encoder import Evicted
from peft_pte.layer import AttentionCall, current_call
from peft_pte.rotary import KeyPositions


@pytest.mark.parametrize("config", [{}, dict(write_gate=True, conv_size=3), dict(conv_size=1, output_gate=False)])
def test_a_probe_answers_as_the_layer_does(config: dict[str, object]) -> None:
    model = with_adapter(tiny_model("llama", torch.float32), window_size=6, encode_keys="post_rope", **config)
    attention = model.get_base_model().model.layers[1].self_attn
    generator = torch.Generator().manual_seed(0)
    d_kv, width, written = attention.thought_encoder.d_kv, attention.o_proj.hidden_size, NOTE.length + 5
    keys, values = torch.randn(2, 3, NOTE.length + probe.TEXT, d_kv, generator=generator)
    asked = torch.randn(3, 4, width, generator=generator)
    features = probe.Features(keys, values, asked, torch.zeros(3, 4, dtype=torch.long))
    actual = probe.Memory(attention)(features, torch.tensor([2, 0]), written - NOTE.length)

    heads = [x[[2, 0], :written].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in (keys, values)]
    positions = KeyPositions(model.get_base_model().model.rotary_emb, torch.arange(written).expand(2, -1))
    encoder, projection = attention.thought_encoder, attention.o_proj
    cores = encoder.advance({}, attention, Evicted(*heads, positions, None), 2)
    states = encoder.read_all(cores)
    nothing = torch.zeros(2, 4, projection.in_features)
    token = current_call.set(AttentionCall(asked[[2, 0]], states, [projection], []))
    try:
        expected = projection(nothing)
    finally:
        current_call.reset(token)
    assert expected.abs().max() > 1e-2 and relative_error(actual, expected) <= 1e-5
