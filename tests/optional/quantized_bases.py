"""A tiny Llama, quantised by each library, on the CPU. A library that is missing skips the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, QuantoConfig, TorchAoConfig


def load(folder: Path, **options) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options)


def bitsandbytes_int8(folder: Path) -> nn.Module:
    need("bitsandbytes")
    return load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def bitsandbytes_nf4(folder: Path) -> nn.Module:
    need("bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32", bnb_4bit_use_double_quant=True
    )
    return load(folder, quantization_config=config)


def torchao_int8(folder: Path) -> nn.Module:
    quantization = need("torchao.quantization")
    return load(folder, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()))


def quanto_int8(folder: Path) -> nn.Module:
    need("optimum.quanto")
    return load(folder, quantization_config=QuantoConfig(weights="int8"))


def hqq_int4(folder: Path) -> nn.Module:
    """By HQQ's own function: transformers 5 has none so far (`HqqConfig` is "not available yet")."""
    config = need("hqq.core.quantize").BaseQuantizeConfig(nbits=4, group_size=32)
    model = load(folder)
    need("hqq.models.hf.base").AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float32, device="cpu")
    return model.eval()


def gguf_q8(folder: Path) -> nn.Module:
    """Written here, as llama.cpp's converter does; transformers unpacks it into plain linear layers."""
    path = folder / "tiny.gguf"
    if not path.exists():
        write_gguf(load(folder), path)
    return load(folder, gguf_file=path.name)


BASES: dict[str, Callable[[Path], nn.Module]] = {
    f.__name__: f for f in (bitsandbytes_int8, bitsandbytes_nf4, torchao_int8, quanto_int8, hqq_int4, gguf_q8)
}


def need(name: str):
    return pytest.importorskip(name, reason=f"{name} is missing: pip install -e '.[quantized]'")


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Matrices in Q8_0, the rest in float32; rows of q and k in the order of interleaved rotary pairs."""
    gguf = need("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_token_list([f"token{number}" for number in range(config.vocab_size)])
    for name, weight in model.state_dict().items():
        own = name.removesuffix(".weight")
        layer = ""
        if own.startswith("model.layers."):
            number, own = own.removeprefix("model.layers.").split(".", 1)
            layer = f"blk.{number}."
        if own in ("self_attn.q_proj", "self_attn.k_proj"):
            weight = weight.view(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2).flatten(0, 2)
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(weight.contiguous().numpy(), kind)
        writer.add_tensor(f"{layer}{NAMES[own]}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
