"""The candidates that are compared with the default are what they say they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import tiny_model

import candidates
from arms import ARMS, adapt
from peft_pte.encoder import ThoughtEncoder
from peft_pte_kernels.reference import delta_update, unit_rows

R = 8


def tokens(seed: int = 0, m: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A core [2, r, r], keys and values [2, m, r] and which of them count [2, m]."""
    generator = torch.Generator().manual_seed(seed)
    core, keys, values = (torch.randn(2, n, R, generator=generator, dtype=torch.float64) for n in (R, m, m))
    return core, keys, values, torch.rand(2, m, generator=generator) < 0.7


def logits(arm: str, change: Callable[[torch.nn.Module], None] | None = None) -> torch.Tensor:
    """Of a model with random parameters, those of the package's own kinds equal for all arms."""
    ids = torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(0))
    with ARMS[arm].variant(), torch.no_grad():
        torch.manual_seed(0)
        model = adapt(tiny_model("llama", torch.float32), ARMS[arm], rank=R, window_size=4)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in sorted(model.named_parameters()):
            if "pte_" in name and "pte_key_conv" not in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if change is not None:
            change(model)
        return model(input_ids=ids, prompt_lengths=2, use_cache=False).logits


def test_heads_are_memories_of_their_own() -> None:
    core, keys, values, valid = tokens()
    whole = candidates.update_in_heads(1, core, keys, values, valid)
    torch.testing.assert_close(whole, delta_update(core, keys, values, valid))
    halves = candidates.update_in_heads(2, core, keys, values, valid)
    half = slice(R // 2, R)
    expected = delta_update(core[:, half, half], keys[..., half], values[..., half], valid)
    torch.testing.assert_close(halves[:, half, half], expected)
    assert not halves[:, : R // 2, half].any()


def test_written_and_erased_keys_token_by_token() -> None:
    core, keys, values, valid = tokens()
    erased = tokens(1)[1] * 0.3
    expected = core.clone()
    for row in range(2):
        for k, e, v in zip(keys[row][valid[row]], erased[row][valid[row]], values[row][valid[row]]):
            expected[row] += torch.outer(k, v - expected[row].T @ e)
    torch.testing.assert_close(candidates.asymmetric_update(core, keys, erased, values, valid), expected)
    unit = unit_rows(keys)
    torch.testing.assert_close(
        candidates.asymmetric_update(core, unit, unit, values, valid), delta_update(core, keys, values, valid)
    )


def test_length_as_gate() -> None:
    """Long keys are unit keys; a key of no length writes nothing."""
    core, keys, values, valid = tokens()
    long = candidates.update_by_length(core, 1e6 * keys, values, valid)
    torch.testing.assert_close(long, delta_update(core, keys, values, valid), rtol=1e-6, atol=1e-6)
    short = candidates.update_by_length(core, 1e-9 * keys, values, valid)
    torch.testing.assert_close(short, core)


def test_gates_that_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delta rule; they start nearly so."""
    monkeypatch.setattr(candidates, "GATE_START", 60.0)
    torch.testing.assert_close(logits("PTE, gates of channels"), logits("PTE"), rtol=1e-4, atol=1e-5)


def test_convolved_values_start_as_values() -> None:
    """And are not those of the default when the convolution has learned something."""
    arm = "PTE, values convolved too"
    torch.testing.assert_close(logits(arm), logits("PTE"))

    def learned(model: torch.nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, ThoughtEncoder):
                module.pte_key_conv["default"].weight.data[-1] = 1

    assert not torch.allclose(logits(arm, learned), logits("PTE"))


def test_least_squares_knows_no_order() -> None:
    """The state after two evictions is that after the same two in the other order, but for what is convolved."""
    torch.manual_seed(0)
    with candidates.with_least_squares():
        model = adapt(tiny_model("llama", torch.float64), ARMS["PTE"], rank=R, window_size=4)
        encoder = next(module for module in model.modules() if isinstance(module, ThoughtEncoder))
        _, keys, values, _ = tokens()
        taps = torch.zeros(1, R, dtype=torch.float64)
        first = encoder.start("default", 2).double()
        parts = [(keys[:, :2], values[:, :2]), (keys[:, 2:], values[:, 2:])]
        states = []
        for order in (parts, parts[::-1]):
            core = first
            for k, v in order:
                core = candidates.reference.write("delta", core, k, v, None, taps)
            states.append(encoder.read("default", core))
    torch.testing.assert_close(*states)
    k = unit_rows(keys)
    gram = k.mT @ k + torch.eye(R, dtype=torch.float64)
    query, initial = encoder.reading("default")
    solved = query @ torch.linalg.solve(gram, k.mT @ values)
    torch.testing.assert_close(states[0], initial + candidates.bound_rows(solved.mT))
