"""The mathematics of the state against plain loops, and the model without any eviction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, RELATIVES, decode, relative_error, tiny_model, with_adapter
from peft import get_peft_model

from peft_pte import PTEConfig
from peft_pte.families import attention_modules
from peft_pte.rotary import KeyPositions
from peft_pte_kernels.reference import (
    DELTA_BLOCK,
    ROW_BOUND,
    bound_rows,
    delta_update,
    normalize_state,
    read_state,
    sum_update,
    unit_rows,
)


def delta_loop(core: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Token by token: M <- M + k (v - M^T k)^T."""
    core = core.clone()
    for row in range(keys.shape[0]):
        for k, v, is_token in zip(keys[row], values[row], valid[row]):
            if is_token:
                k = k / k.norm()
                core[row] += torch.outer(k, v - core[row].T @ k)
    return core


@st.composite
def writes(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    """A core, keys, values [B, m, r] and a mask, float64; some keys nearly parallel, which is the hard case."""
    batch_size, m, r = draw(st.integers(1, 3)), draw(st.integers(1, 3 * DELTA_BLOCK)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    keys = torch.randn(batch_size, m, r, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        keys = keys[:, :1] + 1e-3 * keys
    core = torch.randn(batch_size, r, r, generator=generator, dtype=torch.float64)
    values = torch.randn(batch_size, m, r, generator=generator, dtype=torch.float64)
    valid = torch.rand(batch_size, m, generator=generator) < draw(st.sampled_from([0.5, 1.0]))
    return core, keys, values, valid


@settings(max_examples=100)
@given(writes())
def test_delta_rule_equals_the_token_loop(write: tuple[torch.Tensor, ...]) -> None:
    core, keys, values, valid = write
    expected = delta_loop(core, keys, values, valid)
    error = (delta_update(core, keys, values, valid) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-10
    if valid.all():
        assert torch.equal(delta_update(core, keys, values, None), delta_update(core, keys, values, valid))


@settings(max_examples=50)
@given(writes(), st.data())
def test_writes_can_be_split(write: tuple[torch.Tensor, ...], data: st.DataObject) -> None:
    """Two evictions in a row are one long eviction, for both rules."""
    core, keys, values, valid = write
    m = data.draw(st.integers(0, keys.shape[1]))
    for update in (sum_update, delta_update):
        halves = update(core, keys[:, :m], values[:, :m], valid[:, :m])
        halves = update(halves, keys[:, m:], values[:, m:], valid[:, m:])
        torch.testing.assert_close(halves, update(core, keys, values, valid), rtol=1e-9, atol=1e-9)


def test_garbage_in_padding_is_not_encoded() -> None:
    core = torch.randn(1, 4, 4, dtype=torch.float64)
    keys, values = torch.randn(2, 1, 6, 4, dtype=torch.float64)
    valid = torch.tensor([[True, True, False, True, False, False]])
    for update in (sum_update, delta_update):
        expected = update(core, keys[valid][None], values[valid][None], None)
        keys[~valid], values[~valid] = float("nan"), float("inf")
        torch.testing.assert_close(update(core, keys, values, valid), expected)


def test_delta_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 3), (2, 5, 3), (2, 5, 3))]
    assert torch.autograd.gradcheck(lambda *x: delta_update(*x, None), [x.requires_grad_() for x in inputs])


def test_norms() -> None:
    state = torch.randn(2, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(normalize_state(state, "row").norm(dim=-1), torch.ones(2, 6, dtype=torch.float64))
    frobenius = normalize_state(state, "frobenius")
    torch.testing.assert_close(frobenius.norm(dim=-1).square().mean(-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(unit_rows(frobenius), unit_rows(state))
    assert not normalize_state(torch.zeros(1, 3, 3), "row").any()
    assert not normalize_state(torch.zeros(1, 3, 3), "frobenius").any()


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-8, 1e8), rows=st.integers(1, 5), width=st.integers(1, 40))
def test_bounded_rows(seed: int, scale: float, rows: int, width: int) -> None:
    """Directions stay, no row reaches the bound, longer rows stay longer, and short ones are as they were."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    y = bound_rows(x)
    before, after = x.norm(dim=-1), y.norm(dim=-1)
    assert bool((after <= ROW_BOUND * (1 + 1e-12)).all()) and bool((after <= before).all())
    torch.testing.assert_close(unit_rows(y), unit_rows(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(before.argsort(), after.argsort()) or scale > 1e6  # equal in floating point far beyond it
    short = before < 1e-3
    torch.testing.assert_close(y[short], x[short], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_bound_leaves_the_initial_state_alone(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    cores, query, initial = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 4, 4), (2, 4, 4), (2, 1, 4, 4))
    )
    assert torch.equal(read_state(cores * 0, query, 10 * initial, transposed, "bound"), (10 * initial).expand_as(cores))
    states = read_state(1e6 * cores, query, 10 * initial, transposed, "bound")
    assert (states - 10 * initial).norm(dim=-1).max() <= ROW_BOUND


# --------------------------------------------------------------------------------------------------- rotary positions

YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
PARTIAL = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)


@pytest.mark.parametrize(
    "family, rope",
    [(family, None) for family in (*FAMILIES, *RELATIVES)]
    + [("llama", YARN), ("llama", LLAMA3), ("phi3", PARTIAL), ("glm4", PARTIAL)],
)
def test_positions_are_taken_out_of_cached_keys(family: str, rope: dict | None) -> None:
    """The family's own rotation, undone: also scaled (YaRN), partial, interleaved, and layers without one."""
    base = tiny_model(family, torch.float32, **({} if rope is None else dict(rope_parameters=rope))).double()
    decoder = base.model
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shifted = base(input_ids=ids, position_ids=torch.arange(9)[None] + 50).past_key_values
        at_zero = base(input_ids=ids, position_ids=torch.zeros(2, 9, dtype=torch.long)).past_key_values
    positions = KeyPositions(decoder.rotary_emb, (torch.arange(9) + 50).expand(2, -1))
    layer = 0  # both runs see the same input in the first layer only
    attention = next(iter(attention_modules(decoder).values()))
    keys = shifted.layers[layer].keys
    taken_out = positions.take_out(attention, keys, "pre_rope")
    scaling = float(getattr(decoder.rotary_emb, "attention_scaling", 1.0))
    rotary_dim = positions.rotary_emb(keys, positions.positions)[0].shape[-1]
    at_zero = at_zero.layers[layer].keys.clone()
    if getattr(attention, "use_rope", True):
        at_zero[..., :rotary_dim] /= scaling  # cos(0) = scaling
    torch.testing.assert_close(taken_out, at_zero, rtol=1e-5, atol=1e-5)
    assert torch.equal(positions.take_out(attention, keys, "post_rope"), keys)
    if rope is YARN:
        assert scaling != 1


# ------------------------------------------------------------------------------------------------ window not reached


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [{}, {"window_size": 400}, {"retained_prefix": 0}, {"state_update": "sum"}])
def test_fresh_adapter_is_the_base_model_bit_for_bit(family: str, dtype: torch.dtype, config: dict) -> None:
    """With `init_weights=True` and a window that is long enough: prefill, training forward, decoding, generate."""
    ids = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :5] = -100
    base = tiny_model(family, dtype)
    with torch.no_grad():
        expected = base(input_ids=ids, labels=labels)
        steps = base(input_ids=ids[:, :5])
        logits = [steps.logits]
        for t in range(5, 12):
            steps = base(input_ids=ids[:, t : t + 1], past_key_values=steps.past_key_values)
            logits.append(steps.logits)
        generated = base.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    model = get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", r=4, **config)).eval()
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
        assert torch.equal(model(input_ids=ids).logits, expected.logits)
        decoded, _ = decode(model, ids, None, [5] + [1] * 7)
        assert torch.equal(decoded, torch.cat(logits, dim=1))
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), generated)


def asked_with(
    A: torch.Tensor, state: torch.Tensor, B: torch.Tensor, gate: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    return 8 / 5 * (x @ B.mT @ state.mT * 2 * torch.sigmoid(x @ gate.mT)) @ A.mT


def asks_with_input_of(
    attention: torch.nn.Module, projection: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Add `change` of the input of the attention module to what a projection of it returns."""
    seen = []
    attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True)
    projection.register_forward_hook(lambda _, args, output: output + change(seen.pop()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("update", ["sum", "delta", "none"])
@pytest.mark.parametrize(
    "source, gated", [("hidden_states", True), ("hidden_states", False), ("attention_output", False)]
)
def test_without_eviction_the_update_is_static(family: str, update: str, source: str, gated: bool) -> None:
    """A window as long as the text: the model with A S_0 B added to its weights; at the output projection, which may
    be asked for something else than its own input, and gated, to its result."""
    settings = dict(window_size=20, state_update=update, output_source=source, output_gate=gated)
    model = with_adapter(tiny_model(family), **settings)
    ids = torch.randint(3, 61, (2, 25), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids, prompt_lengths=5).logits
        decoded, cache = decode(model, ids, None, [5] + [1] * 20)
        assert cache.num_evicted == [0, 0]
        weights, asked_elsewhere = {}, {}
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "pte_A"):
                encoder = model.get_base_model().get_submodule(name.rpartition(".")[0]).thought_encoder
                state = encoder.read("default", encoder.start("default", 1))[0]
                A, B = module.pte_A["default"].weight, module.pte_B["default"].weight
                if source == "hidden_states" and name.endswith("o_proj"):
                    gate = module.pte_gate["default"].weight if gated else torch.zeros_like(B)
                    asked_elsewhere[name] = partial(asked_with, A, state, B, gate)
                else:
                    weights[name] = module.base_layer.weight + 8 / 5 * A @ state @ B
        base = model.unload()
        for name, weight in weights.items():
            base.get_submodule(name).weight.copy_(weight)
        assert len(asked_elsewhere) == (2 if source == "hidden_states" else 0)
        for name, change in asked_elsewhere.items():
            asks_with_input_of(base.get_submodule(name.rpartition(".")[0]), base.get_submodule(name), change)
        expected = base(input_ids=ids).logits
    assert relative_error(logits, expected) <= 1e-10
    assert relative_error(decoded, expected) <= 1e-10
