"""How replayed decoding steps are tested without a CUDA graph: results and caches must be those of eager ones.

There is no CUDA graph on the CPU. The step is called directly ("called"), or its operations are recorded and executed
again on the same memory ("recorded"), which is what a graph does: whatever the host decided in the recorded step stays
decided, and a value that is read back to the host is an error. On a machine with a GPU, some tests capture there too.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from models import decode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation.streamers import BaseStreamer

from peft_pte import PTECache
from peft_pte.cache import graph, step

MODES = ["called", "recorded", *(["captured"] if torch.cuda.is_available() else [])]
GREEDY = dict(do_sample=False, max_new_tokens=24, min_new_tokens=24)


class Recording(TorchDispatchMode):
    """The operations of a block of code, to be executed again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read back to the host"
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        own = [x.untyped_storage().data_ptr() not in given for x in results]  # neither a view nor in place
        self.operations.append((function, args, kwargs or {}, results, own))
        return result

    def replay(self) -> None:
        for function, args, kwargs, results, own in self.operations:
            again = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for old, new, is_own in zip(results, again, own):
                if is_own:
                    old.copy_(new)


class Replaying:
    """Switches replays on, and counts them."""

    def __init__(self, patch: pytest.MonkeyPatch, recorded: bool):
        self.is_on, self.count, self.captures = True, 0, 0
        patch.setattr(graph, "can_replay", lambda device: self.is_on)
        patch.setattr(graph, "EAGER_STEPS", 0)
        patch.setattr(PTECache, "cuda_graph", True)
        replay, capture = graph.DecodeStep.replay, graph.DecodeStep.capture

        def counted_replay(step, cache):
            self.count += 1
            return replay(step, cache)

        def counted_capture(step):
            self.captures += 1
            capture(step)
            if recorded:
                with Recording() as step.graph:
                    step.step()

        patch.setattr(graph.DecodeStep, "replay", counted_replay)
        patch.setattr(graph.DecodeStep, "capture", counted_capture)

    def off(self, function, *args, **kwargs):
        """Call a function eagerly."""
        self.is_on, before = False, self.count
        result = function(*args, **kwargs)
        assert self.count == before
        self.is_on = True
        return result


def tokens(length: int = 40, rows: int = 2, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: torch.Tensor, padding: int = 3) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return mask


def batch() -> dict[str, torch.Tensor]:
    ids = tokens(7)
    mask = left_padded(ids)
    return dict(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask)


def assert_alike(a: PTECache, b: PTECache) -> None:
    """Two caches that have seen the same; empty slots may differ."""
    for name in ("lead", "evicted", "stored_length", "columns_left", "limit", "prompt_length", "schedule"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.get_seq_length() == b.get_seq_length()
    assert torch.equal(a.positions.view, b.positions.view)
    empty = (torch.arange(a.stored_length) < torch.tensor(a.lead)[:, None]).to(a.positions.view.device)
    for one, other in zip(a.layers, b.layers, strict=True):
        assert one.cumulative_length == other.cumulative_length
        assert one.get_mask_sizes(1) == other.get_mask_sizes(1)
        for x, y in ((one.keys, other.keys), (one.values, other.values)):
            x, y = (z.masked_fill(empty[:, None, :, None], 0) for z in (x, y))
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
        assert (one.evicted is None) == (other.evicted is None)
        assert one.states.keys() == other.states.keys()
        for name in one.states:
            torch.testing.assert_close(one.states[name], other.states[name], rtol=0, atol=1e-9)


class Words(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.seen.append(-1)


def warned(replaying, model, ids: torch.Tensor | None = None) -> str:
    """Decode where no graph can be made: the results of eager decoding, and one warning."""
    ids = tokens() if ids is None else ids
    config = model.get_decoder().config
    before = config._attn_implementation
    expected, eager = replaying.off(decode, model, ids, None, [7] + [1] * 33)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual, cache = decode(model, ids, None, [7] + [1] * 33)
    messages = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    assert len(messages) == 1 and replaying.count == 0
    assert config._attn_implementation == before and step.current_step.get() is None
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert_alike(cache, eager)
    return messages[0]


def steps_of(model: torch.nn.Module) -> graph.Steps:
    return model.get_decoder().pte_attachment.steps


def counting(monkeypatch, owner: object, name: str) -> list[int]:
    """The calls of a function that is then called as ever."""
    calls, function = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls
