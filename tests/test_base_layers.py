"""Base layers that are no `torch.nn.Linear`: adapted where their structure says that they are linear, else refused."""

from __future__ import annotations

import pytest
import torch
from models import relative_error, tiny_model, with_adapter
from peft import get_peft_model
from torch import nn

from peft_pte import PTEConfig

IDS = torch.randint(3, 61, (2, 30), generator=torch.Generator().manual_seed(0))


class PackedLinear(nn.Module):
    """As HQQ's: no `weight`, but numbers of another dtype under another name, and a dtype to compute in."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = linear.weight.dtype
        self.W_q = nn.Parameter(linear.weight.detach().view(torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W_q.view(self.compute_dtype).mT


class BufferLinear(nn.Module):
    """As those of the first GPTQ libraries: widths under older names, and the weight in a buffer."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().view(torch.int32))
        self.dtype = linear.weight.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.qweight.view(self.dtype).mT


class WrappedLinear(nn.Module):
    """A linear layer inside of another module, as the clipping ones of some families."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class WidthlessLinear(nn.Module):
    """Says nothing about itself."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


def with_layers(cls: type[nn.Module], names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> nn.Module:
    """A tiny model whose projections of these names are of class `cls`."""
    model = tiny_model("llama", torch.float32)
    for layer in model.model.layers:
        for name in names:
            setattr(layer.self_attn, name, cls(getattr(layer.self_attn, name)))
    return model


@pytest.mark.parametrize("cls", [PackedLinear, BufferLinear, WrappedLinear])
def test_linear_layers_are_found_by_structure(cls: type[nn.Module]) -> None:
    """With default targets all four projections are adapted, and compute and train as plain ones do."""
    found = []
    for base in (tiny_model("llama", torch.float32), with_layers(cls)):
        model = with_adapter(base, window_size=6)
        output = model(input_ids=IDS, labels=IDS, prompt_lengths=5)
        output.loss.backward()
        found.append((output.logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (expected, gradients), (actual, own_gradients) = found
    assert {name.split(".")[6] for name in own_gradients} == {"q_proj", "k_proj", "v_proj", "o_proj", "thought_encoder"}
    assert gradients.keys() == own_gradients.keys() and all(g is not None for g in own_gradients.values())
    assert relative_error(actual, expected) <= 1e-6
    assert max(float((own_gradients[name] - g).abs().max()) for name, g in gradients.items()) <= 1e-5


def test_adapters_are_where_the_packed_weight_is() -> None:
    """Not on the CPU, where parameters are made: the layer's only tensor tells the device."""
    model = get_peft_model(with_layers(PackedLinear).to("meta"), PTEConfig())
    adapters = [p for name, p in model.named_parameters() if "pte_" in name]
    assert adapters and all(p.device.type == "meta" for p in adapters)


@pytest.mark.parametrize("names, key", [(("q_proj", "k_proj", "v_proj"), "q_proj"), (("v_proj",), "v_proj")])
def test_others_are_refused_by_name(names: tuple[str, ...], key: str) -> None:
    """By default too, instead of adapting what is left."""
    base = with_layers(WidthlessLinear, names)
    with pytest.raises(ValueError, match=rf"self_attn\.{key}', a WidthlessLinear, which PTE cannot adapt"):
        get_peft_model(base, PTEConfig())
    assert not any("pte" in name or "thought" in name for name, _ in base.named_modules())
