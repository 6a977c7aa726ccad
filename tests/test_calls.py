"""What kind of call the decoder is in, and where its prompt ends: decided in one place, never guessed in silence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import SIZES, decode, relative_error, tiny_model, with_adapter
from peft import get_peft_model

from peft_pte import PTECache, PTEConfig, sequence_logprobs, sequence_loss
from peft_pte.hooks.calls import Decision, Facts, decide

IDS = torch.randint(3, 61, (2, 24), generator=torch.Generator().manual_seed(0))
NOTHING = Facts(
    length=24,
    has_border=False,
    is_generate=False,
    has_cache=False,
    use_cache=None,
    default_use_cache=True,
    trains=False,
    wants_logprobs=False,
)
PROMPT, INTEGER = PTEConfig(window_size=8).cache_policy, PTEConfig(window_size=8, retained_prefix=2).cache_policy
AS_PROMPT = PTEConfig(window_size="prompt").cache_policy
TABLE: list[tuple[str, Any, dict[str, Any], tuple[str, str] | None]] = [
    ("a step with a cache", PROMPT, dict(has_cache=True), ("cached", "input")),
    ("a step of a training loop with a cache", PROMPT, dict(has_cache=True, trains=True), ("cached", "input")),
    ("the prefill of `generate`", PROMPT, dict(has_cache=True, is_generate=True), ("cached", "generate")),
    ("the caller knows better", PROMPT, dict(has_cache=True, is_generate=True, has_border=True), ("cached", "said")),
    ("labels", PROMPT, dict(has_border=True, trains=True), ("replay", "said")),
    ("labels without gradients", PROMPT, dict(has_border=True), ("replay", "said")),
    ("labels, and a cache", PROMPT, dict(has_border=True, use_cache=True), ("cached", "said")),
    ("labels, an integer prefix", INTEGER, dict(has_border=True, trains=True), ("replay", "said")),
    ("generate(use_cache=False)", PROMPT, dict(is_generate=True, use_cache=False), ("replay", "generate")),
    ("the same text inside of `generate`", PROMPT, dict(is_generate=True), ("cached", "generate")),
    ("an explicit prefill", PROMPT, dict(use_cache=True), ("cached", "input")),
    ("an explicit prefill with gradients", PROMPT, dict(use_cache=True, trains=True), ("cached", "input")),
    ("short, no gradients", PROMPT, dict(length=8), ("cached", "input")),
    ("short, with gradients", PROMPT, dict(length=8, trains=True), ("cached", "input")),
    ("short, without a cache", PROMPT, dict(length=8, use_cache=False), ("replay", "end")),
    ("short, log-probabilities", PROMPT, dict(length=8, use_cache=False, wants_logprobs=True), ("replay", "start")),
    ("a bare call", PROMPT, dict(), ("cached", "input")),
    ("a bare call, cache off by default", PROMPT, dict(default_use_cache=False), None),
    ("training without a border", PROMPT, dict(trains=True), None),
    ("no cache, no border", PROMPT, dict(use_cache=False), None),
    ("how long the window is depends on the border", AS_PROMPT, dict(length=8, trains=True), None),
    ("a bare call, integer prefix", INTEGER, dict(), ("cached", "input")),
    ("training, integer prefix", INTEGER, dict(trains=True), ("replay", "none")),
    ("no cache, integer prefix", INTEGER, dict(use_cache=False), ("replay", "none")),
    ("prefix and window, not one more", INTEGER, dict(length=10, trains=True), ("cached", "input")),
]


@pytest.mark.parametrize("policy, facts, expected", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_decisions(policy, facts: dict[str, Any], expected: tuple[str, str] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="cannot tell where the prompt ends"):
            decide(policy, NOTHING._replace(**facts))
        return
    decision = decide(policy, NOTHING._replace(**facts))
    assert (decision.kind, decision.border) == expected and decision.reason
    bare = not facts and policy is PROMPT
    assert (decision.warning is not None) == bare, "only a bare call that is longer than the window is warned of"


def test_the_decision_says_why() -> None:
    assert decide(PROMPT, NOTHING._replace(has_border=True)) == Decision("replay", "said", "a border was given")


@pytest.fixture(scope="module")
def model():
    return with_adapter(tiny_model("llama"), window_size=8)


# ------------------------------------------------------------------------------------- a prompt that comes in parts


@pytest.mark.parametrize("window", [8, "prompt"])
def test_a_shared_prompt_is_computed_once(window) -> None:
    """`generate` with the whole prompt and a copy of a cache that holds its beginning: as without the cache."""
    model = with_adapter(tiny_model("llama"), window_size=window)
    options = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
    with torch.no_grad():
        shared = PTECache()
        model(input_ids=IDS[:, :6], past_key_values=shared)
        for _ in range(2):  # the copy is used up, the original is not
            cache = copy.deepcopy(shared)
            out = model.generate(input_ids=IDS, past_key_values=cache, **options)
            assert torch.equal(out, model.generate(input_ids=IDS, **options))
            assert cache.prompt_length == 24


@pytest.mark.parametrize("chunks", [[10, 14], [1, 22, 1], [24]])
@pytest.mark.parametrize("said_in", ["the first call", "every call", "the second call"])
def test_chunks_by_hand_end_where_the_caller_says(model, chunks: list[int], said_in: str) -> None:
    ids = torch.cat([IDS, IDS], dim=1)
    expected, _ = decode(model, ids, None, [24] + [1] * 24)
    cache, start, logits = PTECache(), 0, []
    with torch.no_grad():
        for index, size in enumerate(chunks):
            says = {"the first call": index == 0, "every call": True, "the second call": index == 1}[said_in]
            border = dict(prompt_lengths=24) if says else {}
            logits.append(model(input_ids=ids[:, start : start + size], past_key_values=cache, **border).logits)
            start += size
    rest, _ = decode(model, ids[:, 24:], None, [1] * 24, cache)
    assert relative_error(torch.cat([*logits, rest], dim=1), expected) < 1e-10


def test_a_prompt_cannot_go_on_after_thoughts(model) -> None:
    cache = PTECache()
    with torch.no_grad():
        model(input_ids=IDS[:, :6], past_key_values=cache)
        model(input_ids=IDS[:, 6:10], past_key_values=cache)
        for length in (24, 3):
            with pytest.raises(ValueError, match=f"The prompt is to have {length} columns, but this cache was told 6"):
                model(input_ids=IDS[:, 10:], past_key_values=cache, prompt_lengths=length)


def test_a_turn_after_thoughts_streams_and_says_so(model) -> None:
    first = model.generate(
        input_ids=IDS[:1, :6], max_new_tokens=12, min_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    turn = torch.cat([first.sequences, IDS[:1, 6:12]], dim=1)
    with pytest.warns(UserWarning, match="holds thoughts already"):
        out = model.generate(input_ids=turn, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        logits = model(input_ids=out, prompt_lengths=6).logits
    assert torch.equal(logits[:, turn.shape[1] - 1 : -1].argmax(-1), out[:, turn.shape[1] :])


# ---------------------------------------------------------------------------------------- another text in `generate`


class Critic(transformers.LogitsProcessor):
    """Calls the model on a text of its own while it generates."""

    def __init__(self, model: torch.nn.Module, call: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]):
        self.model, self.call, self.seen = model, call, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append((input_ids, self.call(self.model, input_ids)))
        return scores


def score(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=True).logits


@pytest.mark.parametrize("options", [dict(), dict(use_cache=False)])
def test_another_text_has_its_own_prompt(model, options: dict[str, Any]) -> None:
    """A critic's text is its own prefill, of 24 tokens and not of the outer prompt's 7."""
    greedy = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, **options)
    prompt = IDS[:, :7].flip(0)
    expected, wanted = model.generate(input_ids=prompt, **greedy), model(input_ids=IDS, use_cache=True).logits
    critic = Critic(model, score)
    assert torch.equal(model.generate(input_ids=prompt, logits_processor=[critic], **greedy), expected)
    assert len(critic.seen) == 12 and all(torch.equal(seen, wanted) for _, seen in critic.seen)
    with pytest.warns(UserWarning, match="outside of `generate`"):  # as it would be elsewhere
        model.generate(input_ids=prompt, logits_processor=[Critic(model, lambda m, i: m(input_ids=IDS))], **greedy)
    # Without a cache nothing says what is prompt and what is not; also as elsewhere.
    unknown = Critic(model, lambda m, i: m(input_ids=IDS, use_cache=False))
    with pytest.raises(ValueError, match="cannot tell where the prompt ends"):
        model.generate(input_ids=prompt, logits_processor=[unknown], **greedy)


def test_the_same_text_has_the_same_prompt(model) -> None:
    """A criterion that scores what has been generated so far gets the policy."""
    critic = Critic(model, lambda m, ids: m(input_ids=ids, use_cache=False).logits)
    model.generate(input_ids=IDS[:, :7], logits_processor=[critic], max_new_tokens=12, min_new_tokens=12)
    for ids, logits in critic.seen:
        with torch.no_grad():
            assert relative_error(logits, model(input_ids=ids, prompt_lengths=7).logits) < 1e-10


# --------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("keep", [None, 5])
def test_a_batch_without_labels_is_all_prompt(keep: int | None) -> None:
    """A micro-batch of which everything that counts was cut off: a loss of zero, in the graph."""
    model = with_adapter(tiny_model("llama"), window_size=8).train()
    options = {} if keep is None else dict(logits_to_keep=keep)
    labels = torch.full_like(IDS[:, -keep:] if keep else IDS, -100)
    loss = model(input_ids=IDS, labels=labels, num_items_in_batch=torch.tensor(17), **options).loss
    assert loss.item() == 0
    loss.backward()
    with torch.no_grad():
        everything = model.eval()(input_ids=IDS, use_cache=True).logits
        assert relative_error(model(input_ids=IDS, labels=torch.full_like(IDS, -100)).logits, everything) < 1e-12
    if keep is None:
        loss = sequence_loss(model.train(), IDS, labels)
        assert loss.item() == 0
        loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)


def test_only_labels_that_are_tokens_are_a_border() -> None:
    """Classes of tokens or of rows, and scores, say nothing about a prompt, whatever their shape."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_labels=6)
    for name, labels in (
        ("TokenClassification", torch.randint(0, 6, (2, 6)).index_fill(1, torch.arange(3), -100)),
        ("SequenceClassification", torch.rand(2, 6)),
    ):
        base = getattr(transformers, f"LlamaFor{name}")(config)
        if name == "SequenceClassification":
            base.config.problem_type = "multi_label_classification"
        settings = dict(task_type={"T": "TOKEN_CLS", "S": "SEQ_CLS"}[name[0]], r=4, init_weights=False)
        model = get_peft_model(base, PTEConfig(window_size=3, **settings)).eval()
        with pytest.raises(ValueError, match="cannot tell where the prompt ends"):
            model(input_ids=IDS[:, :6], attention_mask=torch.ones(2, 6), labels=labels, use_cache=False)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            out = model(input_ids=IDS[:, :6], attention_mask=torch.ones(2, 6), labels=labels, prompt_lengths=2)
            other = model(input_ids=IDS[:, :6], attention_mask=torch.ones(2, 6), prompt_lengths=5)
        assert out.loss.isfinite() and not torch.equal(out.logits, other.logits)


def test_log_probabilities_of_short_rows_need_no_border(model) -> None:
    with torch.no_grad():
        logprobs, _ = sequence_logprobs(model, IDS[:, :8])
    assert (logprobs[:, 1:] < 0).all()
