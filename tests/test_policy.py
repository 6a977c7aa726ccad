"""Rollout, replay and an independent reference compute the same policy (Eq. 1), for random everything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, RELATIVES, decode, relative_error, tiny_model, with_adapter
from peft import get_peft_model_state_dict
from reference_pte import run_reference

REFERENCE_FIELDS = (
    "r",
    "num_global_tokens",
    "pte_alpha",
    "alpha_pattern",
    "window_size",
    "eviction_ratio",
    "retained_prefix",
    "state_update",
    "state_norm",
    "state_norm_type",
    "encode_keys",
    "conv_size",
    "write_gate",
    "output_source",
    "output_gate",
)


@dataclass
class Case:
    """A batch of rows (prompt, completion) and a configuration."""

    family: str
    seed: int
    prompts: list[int]
    completions: list[int]
    config: dict[str, Any]
    rows: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.rows = [
            torch.randint(3, 61, (p + c,), generator=generator).tolist() for p, c in zip(self.prompts, self.completions)
        ]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    update = draw(st.sampled_from(["sum", "delta", "none"]))
    norms = {"sum": ["read", "write", "bound", "none"], "delta": ["bound", "none", "read"], "none": ["read", "none"]}[
        update
    ]
    prefix = draw(st.one_of(st.just("prompt"), st.integers(0, 5)))
    windows = st.integers(1, 9)
    norm = draw(st.sampled_from(norms))
    # Without a norm a random A feeds the state back into itself and grows without bound; a small one does not.
    alphas = st.sampled_from([0.05, 0.1] if norm == "none" else [1, 4])
    patterns = draw(st.sampled_from([(), (), ("o_proj",), (r"layers\.[02]\.self_attn\.\w+_proj", "o_proj")]))
    return dict(
        window_size=draw(st.one_of(st.just("prompt"), windows) if prefix == "prompt" else windows),
        eviction_ratio=draw(st.sampled_from([0.05, 0.25, 0.34, 0.5, 0.8, 1.0])),
        retained_prefix=prefix,
        state_update=update,
        state_norm=norm,
        state_norm_type=draw(st.sampled_from(["row", "frobenius"])),
        encode_keys=draw(st.sampled_from(["pre_rope", "chunk", "post_rope"])),
        output_source=draw(st.sampled_from(["hidden_states", "hidden_states", "attention_output"])),
        output_gate=draw(st.sampled_from([True, True, False])),
        conv_size=1 if update == "none" else draw(st.sampled_from([1, 2, 2, 3, 4])),
        write_gate=update == "delta" and draw(st.booleans()),
        num_global_tokens=draw(st.sampled_from([1, 4] if update == "none" else [0, 1, 4])),
        pte_alpha=draw(alphas),
        alpha_pattern={pattern: draw(alphas) for pattern in patterns},
    )


@st.composite
def cases(draw: st.DrawFn, families: tuple[str, ...] = tuple(FAMILIES), equal: bool = False) -> Case:
    """`equal`: completions of equal length, as a rollout has them before any row stops."""
    batch_size = draw(st.integers(1, 3))
    lengths = st.integers(1, 20)
    completions = draw(st.lists(lengths, min_size=batch_size, max_size=batch_size))
    return Case(
        family=draw(st.sampled_from(families)),
        seed=draw(st.integers(0, 2**16)),
        prompts=draw(st.lists(st.integers(1, 9), min_size=batch_size, max_size=batch_size)),
        completions=[max(completions)] * batch_size if equal else completions,
        config=draw(configs()),
    )


def left_padded(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose completions begin in the same column: the layout of a rollout."""
    width, tail = max(case.prompts), max(case.completions)
    ids = torch.zeros(len(case.rows), width + tail, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (tokens, prompt) in enumerate(zip(case.rows, case.prompts)):
        ids[row, width - prompt : width - prompt + len(tokens)] = torch.tensor(tokens)
        mask[row, width - prompt : width - prompt + len(tokens)] = 1
    return ids, mask


def right_padded(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that begin in the first column: the layout of supervised data."""
    ids = torch.zeros(len(case.rows), max(map(len, case.rows)), dtype=torch.long)
    for row, tokens in enumerate(case.rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids, (torch.arange(ids.shape[1]) < torch.tensor([len(t) for t in case.rows])[:, None]).long()


def of_row(case: Case, logits: torch.Tensor, mask: torch.Tensor, row: int) -> torch.Tensor:
    """Logits of a row's tokens, without padding."""
    return logits[row, mask[row].bool()]


def reference_logits(case: Case, model: Any) -> list[torch.Tensor]:
    config = {name: getattr(model.peft_config["default"], name) for name in REFERENCE_FIELDS}
    if config["window_size"] == "prompt":
        config["window_size"] = max(case.prompts)  # the longest prompt of the batch
    adapter = get_peft_model_state_dict(model)
    base = model.unload()
    return [run_reference(base, adapter, config, row, prompt).logits for row, prompt in zip(case.rows, case.prompts)]


@settings(max_examples=200)
@given(case=cases(equal=True))
def test_replay_equals_decoding(case: Case) -> None:
    """Log-probabilities of the teacher-forced forward are those of token-by-token decoding, to 1e-10 in float64."""
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config)
    ids, mask = left_padded(case)
    width = max(case.prompts)
    logits, cache = decode(model, ids, mask, [width] + [1] * case.completions[0])
    borders = [width] * len(case.rows)
    replayed = model(input_ids=ids, attention_mask=mask, prompt_lengths=borders).logits
    valid = mask.bool()
    assert relative_error(replayed[valid], logits[valid]) <= 1e-10
    assert cache.get_seq_length() == ids.shape[1]


@settings(max_examples=60)
@given(case=cases())
def test_both_equal_the_reference(case: Case) -> None:
    """Left-padded, right-padded and ragged batches give what a row alone gives in the plain reference."""
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config)
    left, left_mask = left_padded(case)
    right, right_mask = right_padded(case)
    width = max(case.prompts)
    with torch.no_grad():
        labels = right.clone()
        labels[torch.arange(right.shape[1]) < torch.tensor(case.prompts)[:, None]] = -100
        labels[right_mask == 0] = -100
        outputs = {
            "left": (model(input_ids=left, attention_mask=left_mask, prompt_lengths=width).logits, left_mask),
            "right": (
                model(input_ids=right, attention_mask=right_mask, prompt_lengths=case.prompts).logits,
                right_mask,
            ),
            "labels": (model(input_ids=right, attention_mask=right_mask, labels=labels).logits, right_mask),
        }
        # A rollout goes on with pads after a row has stopped; they are tokens of its own, after all that counts.
        decoding_mask = left_mask.clone()
        decoding_mask[:, width:] = 1
        logits, _ = decode(model, left, decoding_mask, [width] + [1] * (left.shape[1] - width))
        outputs["decode"] = (logits, left_mask)
    for name, (logits, mask) in outputs.items():
        outputs[name] = [of_row(case, logits, mask, row) for row in range(len(case.rows))]
    for row, expected in enumerate(reference_logits(case, model)):
        for name, logits in outputs.items():
            assert relative_error(logits[row], expected) <= 1e-10, (name, row)


@settings(max_examples=60)
@given(case=cases(tuple(FAMILIES) + tuple(RELATIVES), equal=True))
def test_float32(case: Case) -> None:
    """The same in float32, where rounding is what remains."""
    model = with_adapter(tiny_model(case.family, torch.float32, seed=case.seed), **case.config)
    ids, mask = left_padded(case)
    logits, _ = decode(model, ids, mask, [max(case.prompts)] + [1] * case.completions[0])
    with torch.no_grad():
        replayed = model(input_ids=ids, attention_mask=mask, prompt_lengths=max(case.prompts)).logits
    assert relative_error(replayed[mask.bool()], logits[mask.bool()]) <= 1e-4


@settings(max_examples=60)
@given(case=cases(equal=True), data=st.data())
def test_number_of_tokens_per_call_does_not_matter(case: Case, data: st.DataObject) -> None:
    """Chunk invariance: logits, cache and states are the same however the tokens come in."""
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config)
    ids, mask = left_padded(case)
    width, total = max(case.prompts), ids.shape[1]
    sizes = [width]
    while sum(sizes) < total:
        sizes.append(min(data.draw(st.sampled_from([1, 2, 3, 5, 17])), total - sum(sizes)))
    one_by_one, cache = decode(model, ids, mask, [width] + [1] * (total - width))
    in_chunks, other = decode(model, ids, mask, sizes)
    assert relative_error(in_chunks[mask.bool()], one_by_one[mask.bool()]) <= 1e-10
    assert other.num_evicted == cache.num_evicted
    stored = cache.compact_mask(mask, 0)[:, None, :, None].bool()
    for a, b in zip(cache.layers, other.layers):
        torch.testing.assert_close(a.keys.where(stored, 0), b.keys.where(stored, 0), rtol=0, atol=1e-9)
        torch.testing.assert_close(a.cores["default"], b.cores["default"], rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(case=cases(equal=True), repeats=st.integers(1, 3))
def test_batch_invariance(case: Case, repeats: int) -> None:
    """A row alone, in a batch, re-ordered or repeated is the same row."""
    if case.config["window_size"] == "prompt":  # by its definition depends on the batch
        case.config["window_size"] = 4
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config)
    ids, mask = left_padded(case)
    width = max(case.prompts)
    half = width + (ids.shape[1] - width) // 2
    together, cache = decode(model, ids[:, :half], mask, [width] + [1] * (half - width))
    cache.batch_repeat_interleave(repeats)
    order = torch.randperm(len(case.rows) * repeats, generator=torch.Generator().manual_seed(case.seed))
    cache.reorder_cache(order)
    ids2, mask2 = (t.repeat_interleave(repeats, 0)[order] for t in (ids, mask))
    steps = [1] * (ids.shape[1] - half)
    rest, _ = decode(model, ids2[:, half:], mask2, steps, cache) if steps else (together[:0], cache)
    for row, tokens in enumerate(case.rows):
        alone, _ = decode(model, torch.tensor([tokens]), None, [case.prompts[row]] + [1] * case.completions[row])
        assert relative_error(of_row(case, together, mask[:, :half], row), alone[0][: -len(steps) or None]) <= 1e-10
        for copy in (order // repeats == row).nonzero()[:, 0] if steps else ():
            assert relative_error(rest[copy], alone[0][-len(steps) :]) <= 1e-10


@pytest.mark.parametrize("family", [*FAMILIES, *RELATIVES])
@pytest.mark.parametrize("encode_keys", ["pre_rope", "chunk", "post_rope"])
def test_every_family_decodes_what_it_replays(family: str, encode_keys: str) -> None:
    """All families, also those without an independent reference (float64; their norms may be float32 inside)."""
    model = with_adapter(tiny_model(family), window_size=6, encode_keys=encode_keys)
    ids = torch.randint(3, 61, (2, 30), generator=torch.Generator().manual_seed(0))
    logits, cache = decode(model, ids, None, [5] + [1] * 25)
    with torch.no_grad():
        replayed = model(input_ids=ids, prompt_lengths=5).logits
    assert min(cache.num_evicted) > 10
    assert relative_error(replayed, logits) <= (1e-10 if family in FAMILIES else 1e-5)
