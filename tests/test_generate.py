"""`generate` works unchanged, under a cache of constant size."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from models import decode, relative_error, tiny_model, with_adapter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from peft_pte import PTECache

GREEDY = dict(do_sample=False, max_new_tokens=24, min_new_tokens=24)


@pytest.fixture(scope="module")
def model():
    return with_adapter(tiny_model("qwen2"), window_size=8)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Two prompts of different lengths, left-padded."""
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return dict(input_ids=ids, attention_mask=mask)


@pytest.fixture(scope="module")
def greedy(model, batch) -> torch.Tensor:
    return model.generate(**batch, **GREEDY)


def test_generate_is_the_argmax_of_the_replay(model, batch, greedy) -> None:
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 24, dtype=torch.long)], dim=1)
    with torch.no_grad():
        logits = model(input_ids=greedy, attention_mask=mask, prompt_lengths=7).logits
    logits[..., 2] = -torch.inf  # min_new_tokens forbids the end-of-sequence token
    torch.testing.assert_close(logits[:, 6:-1].argmax(-1), greedy[:, 7:])


@pytest.mark.parametrize("options", [dict(use_cache=False), dict(prefill_chunk_size=2), dict(prefill_chunk_size=4)])
def test_ways_to_feed_do_not_matter(model, batch, greedy, options) -> None:
    assert torch.equal(model.generate(**batch, **GREEDY, **options), greedy)


@pytest.mark.parametrize("options", [dict(prefill_chunk_size=2), dict(prefill_chunk_size=5), dict(use_cache=False)])
def test_streaming_prompt_in_chunks(batch, options) -> None:
    """With an integer prefix long prompts stream through the window; left padding may come in over several calls."""
    model = with_adapter(tiny_model("llama"), window_size=3, retained_prefix=1)
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, **options), expected)
    alone = model.generate(input_ids=batch["input_ids"][:1, 3:], **GREEDY)
    assert torch.equal(alone[0, 4:], expected[0, 7:])


def test_rows_do_not_see_each_other(model, batch, greedy) -> None:
    alone = model.generate(input_ids=batch["input_ids"][:1, 3:], **GREEDY)
    assert torch.equal(alone[0, 4:], greedy[0, 7:])


def test_own_empty_cache_is_adopted_in_place(model, batch, greedy) -> None:
    cache = DynamicCache(config=model.config)
    assert torch.equal(model.generate(**batch, **GREEDY, past_key_values=cache), greedy)
    assert isinstance(cache, PTECache)
    assert cache.num_evicted == [16, 16]


def test_hand_written_loop(model, batch, greedy) -> None:
    cache, ids, mask = DynamicCache(), batch["input_ids"], batch["attention_mask"]
    tokens = ids
    with torch.no_grad():
        for _ in range(24):
            logits = model(input_ids=tokens, attention_mask=mask, past_key_values=cache).logits[:, -1]
            logits[:, 2] = -torch.inf
            tokens = logits.argmax(-1, keepdim=True)
            ids = torch.cat([ids, tokens], dim=1)
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    assert torch.equal(ids, greedy)


def test_inputs_embeds(model, batch, greedy) -> None:
    embeds = model.get_input_embeddings()(batch["input_ids"])
    out = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **GREEDY)
    assert torch.equal(out, greedy[:, 7:])


def test_sampling_depends_on_the_seed_only(model, batch) -> None:
    options = dict(do_sample=True, max_new_tokens=20, num_return_sequences=3)
    torch.manual_seed(7)
    first = model.generate(**batch, **options)
    torch.manual_seed(7)
    assert torch.equal(model.generate(**batch, **options), first)
    torch.manual_seed(7)
    assert torch.equal(model.generate(**batch, **options, use_cache=False), first)
    assert first.shape[0] == 6


def test_beams_re_order_states_with_their_rows(model, batch) -> None:
    options = dict(num_beams=4, num_return_sequences=2, do_sample=False, max_new_tokens=24)
    out = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, use_cache=False), out)


def test_beams_with_rows_out_of_step(batch) -> None:
    model = with_adapter(tiny_model("qwen2"), window_size=5, retained_prefix=2)
    options = dict(num_beams=3, do_sample=False, max_new_tokens=20)
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


def test_two_generations_interleaved(model) -> None:
    """All runtime state is in the caches: two sequences may take turns on one model."""
    ids = torch.randint(3, 61, (2, 2, 30), generator=torch.Generator().manual_seed(1))
    separate = [decode(model, ids[i], None, [5] + [1] * 25)[0] for i in range(2)]
    caches = [PTECache(), PTECache()]
    for start, size in [(0, 5)] + [(t, 1) for t in range(5, 30)]:
        for i in range(2):
            logits, _ = decode(model, ids[i, :, start : start + size], None, [size], caches[i])
            assert torch.equal(logits, separate[i][:, start : start + size])


def test_continuing_a_conversation(model) -> None:
    """A returned cache goes on where it was; a new turn's tokens are thoughts like any others."""
    ids = torch.randint(3, 61, (1, 12), generator=torch.Generator().manual_seed(2))
    first = model.generate(input_ids=ids, **GREEDY, return_dict_in_generate=True)
    turn = torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(4))
    both = torch.cat([first.sequences, turn], dim=1)
    # The last token of the first answer was never fed: generate feeds it with the new turn.
    # With a mask, because a random model may say the padding token, which would be taken for padding.
    mask = torch.ones_like(both)
    out = model.generate(input_ids=both, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    with torch.no_grad():
        logits = model(input_ids=out, prompt_lengths=12).logits
    logits[..., 2] = -torch.inf
    assert torch.equal(logits[:, both.shape[1] - 1 : -1].argmax(-1), out[:, both.shape[1] :])


def test_one_prefill_for_several_continuations(model) -> None:
    """A cache can be copied; the copies do not notice each other."""
    ids = torch.randint(3, 61, (1, 30), generator=torch.Generator().manual_seed(5))
    expected, _ = decode(model, ids, None, [5] + [1] * 25)
    _, cache = decode(model, ids[:, :18], None, [5] + [1] * 13)
    for _ in range(2):
        rest, _ = decode(model, ids[:, 18:], None, [1] * 12, copy.deepcopy(cache))
        assert relative_error(rest, expected[:, 18:]) <= 1e-10


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(61)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2", padding_side="left"
    )


def test_streamer(model, batch) -> None:
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True)
    ids = batch["input_ids"][1:]
    thread = threading.Thread(target=model.generate, kwargs=dict(input_ids=ids, streamer=streamer, **GREEDY))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == [f"w{i}" for i in model.generate(input_ids=ids, **GREEDY)[0, 7:].tolist()]


def test_pipeline(model) -> None:
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer())
    texts = ["w5 w6 w7 w8 w9", "w10 w11"]
    out = pipe(texts, batch_size=2, **GREEDY)
    for text, answer in zip(texts, out):
        alone = pipe(text, **GREEDY)
        assert answer[0]["generated_text"] == alone[0]["generated_text"]
        assert answer[0]["generated_text"].count("w") == text.count("w") + 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """States are float32 in half precision, adapters too (PEFT's default), and decoding follows the replay."""
    model = with_adapter(tiny_model("llama", dtype), window_size=8)
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    cache = PTECache()
    out = model.generate(input_ids=ids, **GREEDY, past_key_values=cache)
    assert cache.layers[0].keys.dtype == dtype
    assert cache.layers[0].cores["default"].dtype == cache.layers[0].states["default"].dtype == torch.float32
    logits, _ = decode(model, out, None, [7] + [1] * 24)
    with torch.no_grad():
        replayed = model(input_ids=out, prompt_lengths=7).logits
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 1e-2}[dtype]
    assert relative_error(replayed.float(), logits.float()) <= bound


def test_half_precision_adapter_keeps_float32_states() -> None:
    model = with_adapter(tiny_model("llama", torch.bfloat16), window_size=8)
    model.to(torch.bfloat16)
    cache = PTECache()
    model.generate(input_ids=torch.randint(3, 61, (1, 7)), **GREEDY, past_key_values=cache)
    assert cache.layers[0].cores["default"].dtype == torch.float32


def test_cache_bytes_are_constant() -> None:
    """The same bytes after 2,000 and after 8,000 generated tokens."""
    base = tiny_model("llama", torch.float32, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    model = with_adapter(base, window_size=64, r=4)
    cache, sizes = PTECache(), {}

    def watch(ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        sizes[ids.shape[1] - 5] = cache.nbytes
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    ids = torch.randint(3, 61, (1, 5))
    options = dict(max_new_tokens=8_001, min_new_tokens=8_001, do_sample=False)
    model.generate(input_ids=ids, past_key_values=cache, stopping_criteria=[watch], **options)
    assert sizes[2_000] == sizes[8_000] == cache.nbytes
    assert set(sizes[t] for t in range(66, 8_000)) == {sizes[2_000]}
    assert cache.num_evicted[0] > 7_900
    full = 2 * 8_005 * 2 * 4 * 4  # keys and values of 2 heads of width 4 in float32
    assert sizes[8_000] < full / 50


def test_state_norms_are_for_looking(model, batch) -> None:
    cache = PTECache()
    model.generate(**batch, **GREEDY, past_key_values=cache)
    norms = cache.state_norms()["default"]
    assert norms.shape == (2, 2) and bool((norms > 0).all())


def test_the_state_stays_bounded(batch) -> None:
    """Values that depend on the state are written into it: without a bound this feedback can run away."""

    def longest_row(state_norm: str) -> float:
        torch.manual_seed(0)
        model = with_adapter(
            tiny_model("llama"), window_size=4, r=8, num_global_tokens=0, pte_alpha=8, state_norm=state_norm
        )
        model.eval()
        for name, parameter in model.named_parameters():
            if "pte_A" in name:
                torch.nn.init.normal_(parameter, std=1.0 if "v_proj" in name else 0.0)
            if "pte_value" in name:
                parameter.data.mul_(3.0)
        cache = PTECache()
        with torch.no_grad():
            for _ in range(60):
                model(input_ids=torch.randint(3, 61, (2, 16)), past_key_values=cache, use_cache=True)
        return cache.state_norms()["default"].max().item() / 8**0.5

    assert not longest_row("none") < 100.0  # inf and nan too
    assert longest_row("bound") <= 2.0


def test_off_is_off(batch) -> None:
    """With the adapter off `generate` is the base model's, with its ordinary cache."""
    base = tiny_model("qwen2")
    expected = base.generate(**batch, **GREEDY, return_dict_in_generate=True)
    model = with_adapter(base, window_size=8)
    assert not torch.equal(model.generate(**batch, **GREEDY), expected.sequences)
    with model.disable_adapter():
        out = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected.sequences)
    assert type(out.past_key_values) is DynamicCache
