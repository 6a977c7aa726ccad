"""Make a Hugging Face decoder compute in float64 throughout.

transformers computes RMSNorm and the rotary tables in float32 whatever the dtype of the model, so that two
ways to the same numbers agree to about 1e-6 at best. The helpers here replace the `forward` of those
submodules, on the instances of one model, so that properties can be tested to 1e-10. They go by class name
(`...RMSNorm` and `...RotaryEmbedding`) and find the submodules inside any wrapper, such as a PeftModel. Each
replacement is compared with what it replaces when it is installed, so that a family that computes something
else is refused, not altered.

Build the model with `attn_implementation="sdpa"`: eager attention takes its softmax in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

# Tables that do not depend on the length of the sequence.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def make_exact_float64(model: Model) -> Model:
    """Patch the RMSNorm and rotary modules of `model` in place, for good, and return it.

    Bound methods are used, so that a deep copy of the model is patched too and calls its own submodules.
    """
    for module in model.modules():
        forward = _replacement(module)
        if forward is not None:
            module.forward = MethodType(forward, module)
    return model


@contextmanager
def exact_float64(model: Model) -> Iterator[Model]:
    """Patch as `make_exact_float64` does for the length of a `with` block."""
    modules = list(model.modules())
    before = [module.__dict__.get("forward") for module in modules]
    try:
        yield make_exact_float64(model)
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is not None:
                module.forward = forward
            else:
                module.__dict__.pop("forward", None)


def _replacement(module: nn.Module) -> Callable[..., Any] | None:
    """The float64 forward for this module, None if it needs none."""
    name = type(module).__name__
    if getattr(module.forward, "__func__", None) in (_rms_norm, _rotary_halves, _rotary_pairs):
        return None  # patched already
    if name.endswith("RMSNorm"):
        width = module.weight.shape[-1]
        return _checked(module, (_rms_norm,), torch.linspace(-2.0, 3.0, 3 * width).view(3, width))
    if name.endswith("RotaryEmbedding"):
        if module.rope_type not in STATIC_ROPE_TYPES:
            raise NotImplementedError(f"float64 tables for rope_type {module.rope_type!r}")
        # Two layouts are in use: all frequencies twice, or each of them twice.
        return _checked(module, (_rotary_halves, _rotary_pairs), torch.zeros(1), torch.arange(4)[None])
    return None


def _checked(module: nn.Module, candidates: tuple[Callable[..., Any], ...], *inputs: Tensor) -> Callable[..., Any]:
    """The first candidate that agrees with the module's own forward up to float32."""
    tensor = next(iter([*module.parameters(), *module.buffers()]))
    if tensor.is_meta:
        raise ValueError(f"{type(module).__name__} has no values yet: patch the model after loading it")
    inputs = tuple(x.to(tensor.device) for x in inputs)
    with torch.no_grad():
        expected = _as_tensor(module(*inputs))
        for candidate in candidates:
            got = _as_tensor(candidate(module, *inputs))
            if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
                return candidate
    raise NotImplementedError(f"{type(module).__name__} is not what this helper takes it for")


def _as_tensor(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return (torch.stack(output) if isinstance(output, tuple) else output).double()


def _rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    x = hidden_states.double()
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return (self.weight.double() * x).to(torch.promote_types(hidden_states.dtype, self.weight.dtype))


def _inverse_frequencies(self: nn.Module) -> Tensor:
    """In float64 from the config; for scaled tables the module's own, which are float32 but constants."""
    if self.rope_type != "default":
        return self.inv_freq.double()
    rope, config = self.config.rope_parameters, self.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=self.inv_freq.device) / dim
    return 1.0 / rope["rope_theta"] ** exponents


@torch.no_grad()
def _rotary_halves(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None].double() * _inverse_frequencies(self)
    return _tables(self, torch.cat([angles, angles], dim=-1), x.dtype)


@torch.no_grad()
def _rotary_pairs(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None].double() * _inverse_frequencies(self)
    return _tables(self, angles.repeat_interleave(2, dim=-1), x.dtype)


def _tables(self: nn.Module, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
    return cos.to(dtype), sin.to(dtype)
