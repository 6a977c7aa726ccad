"""What kind of call the decoder is in: a step with a cache or a replay, and where its prompt ends.

One place decides, from a few facts that callers give or leave out; the rest follows what was decided.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ..config import CachePolicy

UNKNOWN_BORDER = (
    "PTE cannot tell where the prompt ends and the thoughts begin, and the input ({length} tokens) is longer than the "
    "window (window_size={window!r}). Pass `prompt_lengths` ([batch], the column of each row at which its completion "
    "begins) or `labels` (-100 on the prompt). A trainer that takes the labels out of the batch (`compute_metrics`, "
    "`label_smoothing_factor`, `compute_loss_func`, rewards, distillation) keeps the border with one line: `class "
    "MyTrainer(KnownPrompts, SFTTrainer): pass`, with `from peft_pte.trainers.prompts import KnownPrompts`. If the "
    "whole input is a prompt, pass `use_cache=True` or wrap the call in `torch.no_grad()` with the cache on."
)
GUESSED_PROMPT = (
    "PTE was called outside of `generate` with more tokens than its window (window_size={window!r}), and nothing says "
    "where the prompt ends. All of them are taken as a prompt, which is never evicted: these are logits of the full "
    "cache, not of the policy that `generate` samples from. To score a text, pass `prompt_lengths` ([batch], the "
    "column of each row at which its completion begins) or `labels` (-100 on the prompt), or use "
    "`peft_pte.sequence_logprobs`. If it is a prompt, pass `use_cache=True`."
)
TURN_STREAMS = (
    "`generate` was called with a cache that holds thoughts already. What is new in its prompt streams through the "
    "window like thoughts, since only a prompt that nothing has followed yet can go on. If all of it is to be kept, "
    "start with a new cache."
)


class Facts(NamedTuple):
    """What is known about a call of the decoder."""

    length: int  # columns of the input
    has_border: bool  # the caller says where the prompt ends
    is_generate: bool  # a `generate` runs, whose own prompt the input is, or begins with
    has_cache: bool  # a cache was given
    use_cache: bool | None  # as it was given
    default_use_cache: bool  # of the model's configuration
    trains: bool  # the call builds a graph for the adapter
    wants_logprobs: bool  # a head asks for the log-probabilities of what is not prompt


class Decision(NamedTuple):
    """What kind of call it is.

    kind: `"cached"`: the tokens are fed to the cache, to a new one if none was given. `"replay"`: whole sequences,
        segment by segment.
    border: where the prompt ends. `"said"`: where the caller says. `"generate"`: where the prompt of the running
        `generate` does. `"input"` (cached): with the first call, so that the whole input is a prompt. `"end"` and
        `"start"` (replay): nothing is evicted, so all of the input may count as prompt, or nothing of it. `"none"`
        (replay): an integer prefix needs none.
    reason: why, in a few words. warning: what the caller is to be told.
    """

    kind: Literal["cached", "replay"]
    border: Literal["said", "generate", "input", "end", "start", "none"]
    reason: str
    warning: str | None = None


def decide(policy: CachePolicy, facts: Facts) -> Decision:
    """The kind of call.

    Raises:
        ValueError: the border matters, and nothing says where it is.
    """
    use_cache = facts.default_use_cache if facts.use_cache is None else facts.use_cache
    if facts.has_cache:
        return Decision("cached", in_cache(facts), "a cache was given")
    if facts.has_border:
        # Labels and the like mean a loss, for which the model's default to keep a cache is not meant.
        if facts.use_cache:
            return Decision("cached", "said", "a border was given, and a cache is asked for")
        return Decision("replay", "said", "a border was given")
    if facts.is_generate:
        return Decision("cached" if use_cache else "replay", "generate", "a step of `generate`")
    if facts.use_cache:
        return Decision("cached", "input", "a cache is asked for: a prefill")
    keeps_prompt = policy.retained_prefix == "prompt"
    fits = policy.window_size != "prompt" and facts.length <= policy.prefix(0) + policy.window_size
    if use_cache and fits:
        return Decision("cached", "input", "nothing is evicted")
    if use_cache and not facts.trains:
        # How a prefill by hand begins, and how harnesses score texts: it cannot be told apart.
        warning = GUESSED_PROMPT.format(window=policy.window_size) if keeps_prompt else None
        return Decision("cached", "input", "no gradients: a prefill", warning)
    if not keeps_prompt:
        return Decision("replay", "none", "an integer prefix needs no border")
    if not fits:
        raise ValueError(UNKNOWN_BORDER.format(length=facts.length, window=policy.window_size))
    return Decision("replay", "start" if facts.wants_logprobs else "end", "nothing is evicted")


def in_cache(facts: Facts) -> Literal["said", "generate", "input"]:
    if facts.has_border:
        return "said"
    return "generate" if facts.is_generate else "input"
