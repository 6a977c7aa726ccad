"""`PTECache`: the bounded KV cache, [retained prefix | retained thoughts], and everything a sequence carries.

All runtime state of a generation lives here, so that two generations on one model do not notice each other.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..compiling import uncompiled
from ..config import CachePolicy
from .layers import PTECacheLayer, refuse_rollback
from .rows import EMPTY, Tally, slack, visible
from .schedule import Schedule, stored_columns
from .slots import SlotBuffer


class PTECache(DynamicCache):
    """A KV cache of constant size for PTE: the prompt (or a prefix of it) and the latest thoughts.

    `PTECache()` is empty and knows no policy; the first forward of a PTE model with it binds it to the active
    adapters. `generate` makes one by itself. Pass your own to look at it afterwards, or to continue from it:

    ```py
    cache = PTECache()
    model.generate(**inputs, past_key_values=cache)
    cache.nbytes, cache.num_evicted, cache.state_norms()
    ```

    Args:
        cuda_graph: on a GPU, replay the decoder's step of one token as a CUDA graph (graph.py), with the same
            results up to rounding; needs torch 2.12. The graph is made after a few steps, and stays with the model for
            the next cache of the same shape, together with slots for one. None: as `PTECache.cuda_graph` says, which
            also holds for caches that `generate` makes: off, unless you set it.
    """

    cuda_graph = False

    def __init__(self, cuda_graph: bool | None = None) -> None:
        super().__init__()
        if cuda_graph is not None:
            self.cuda_graph = cuda_graph
        self._clear()

    def _clear(self) -> None:
        self._policy: CachePolicy | None = None
        self.adapters: tuple[str, ...] = ()
        self.schedule: Schedule | None = None  # known when the prompt is complete, for window_size="prompt"
        self.has_padding = False  # as far as prefills show
        self.loop: object | None = None  # the `generate` call that made or took it, see hooks/border.py
        self.prompt_length: int | None = None
        self.positions = SlotBuffer()  # [B, 1, slots, 1], absolute position of every stored token
        self.evicted: list[int] = []  # tokens, by row
        # Rows leave lockstep when padding is found among their thoughts, or in front of an integer prefix: see rows.py.
        self.columns = SlotBuffer()  # [B, 1, slots, 1], the caller's column in each slot; empty while in lockstep
        self.lead: list[int] = []  # empty slots in front, by row, when they were counted last
        self.columns_left = 0  # out of lockstep: how many can come before a row may be full
        self.limit = 0  # slots that there will be

    @classmethod
    def adopt(cls, cache: DynamicCache) -> PTECache:
        """Turn the caller's own, still empty `DynamicCache` into a `PTECache` in place.

        In place, because a decoding loop that holds the cache would otherwise go on with an empty one.

        Raises:
            ValueError: the cache is of another kind, or not empty.
        """
        if isinstance(cache, cls) and cache.is_bound:
            return cache
        plain = type(cache) in (DynamicCache, cls) and all(type(layer) is DynamicLayer for layer in cache.layers)
        if not plain or getattr(cache, "offloading", False):
            raise ValueError(
                f"`past_key_values` is a {type(cache).__name__}"
                f"{' with offloading' if getattr(cache, 'offloading', False) else ''}, but PTE keeps its thoughts in "
                "a PTECache. Pass `PTECache()`, an empty `DynamicCache()` or nothing: static, offloaded and quantised "
                "caches are not supported."
            )
        if cache.get_seq_length():
            raise ValueError(
                f"`past_key_values` is a {type(cache).__name__} that already holds {cache.get_seq_length()} tokens, "
                "which were computed without PTE. Start from an empty cache, or from one that this PTE model returned."
            )
        cache.__class__ = cls
        cache._clear()
        return cache

    @property
    def is_bound(self) -> bool:
        """Whether a PTE model has used this cache."""
        return self._policy is not None

    @property
    def policy(self) -> CachePolicy:
        """That of the adapters that the cache is bound to."""
        if self._policy is None:
            raise RuntimeError("No PTE model has used this cache yet.")
        return self._policy

    @uncompiled
    def bind(self, policy: CachePolicy, adapters: tuple[str, ...], num_layers: int, batch_size: int) -> None:
        """Fix policy and adapters at first use; later, check that they are still the same."""
        if not self.is_bound:
            self._policy, self.adapters = policy, adapters
            self.layer_class_to_replicate = None
            self.layers = [PTECacheLayer() for _ in range(num_layers)]
            self.evicted, self.lead = [0] * batch_size, [0] * batch_size
        if (self.policy, self.adapters) != (policy, adapters):
            raise ValueError(
                f"`past_key_values` was filled with adapter(s) {list(self.adapters)} active and the cache policy "
                f"{self.policy}, but now {list(adapters)} with {policy} are. A cache cannot change hands, and keeps "
                "its window: start a new one."
            )
        if len(self.evicted) != batch_size:
            raise ValueError(
                f"`past_key_values` holds {len(self.evicted)} rows, but the input has {batch_size}. Use "
                "`batch_repeat_interleave` or `batch_select_indices` to change the number of rows."
            )

    @uncompiled
    def begin_prompt(self, mask: torch.Tensor | None, new_length: int, prompt_length: int | None) -> None:
        """Tell the cache, before its first tokens and while the prompt comes in, where prompt and prefix end.

        Args:
            mask: [B, seen + new_length], 0 on padding, or None.
            new_length: number of tokens that this call brings.
            prompt_length: columns of the whole prompt if known; else the first call brings the whole prompt. It may be
                given anew, and larger, as long as no thought is stored: the prompt goes on.

        Raises:
            ValueError: the prompt cannot go on, or has become shorter.
        """
        seen, window = self.get_seq_length(), self.policy.window_size
        if mask is not None and new_length > 1 and not self.has_padding:
            self.has_padding = not bool(mask[:, seen:].all())
        if self.prompt_length is None:
            self.prompt_length = seen + new_length if prompt_length is None else prompt_length
        elif self.policy.retained_prefix == "prompt" and prompt_length not in (None, self.prompt_length):
            if self.holds_thoughts or prompt_length < self.prompt_length:
                raise ValueError(
                    f"The prompt is to have {prompt_length} columns, but this cache was told {self.prompt_length} and "
                    f"has seen {seen}: a prompt can only become longer, and only until a thought is stored. Give its "
                    "length no more and what follows are thoughts, or start from a new cache, or from a copy "
                    "(`copy.deepcopy`) that was made when the prompt had been read."
                )
            self.prompt_length = prompt_length
            if window == "prompt":  # a schedule that was made for a shorter one has had no effect
                self.schedule = None
        if self.schedule is None and (window != "prompt" or seen + new_length >= self.prompt_length):
            longest = self.prompt_length
            if window == "prompt" and mask is not None:
                longest = int(mask[:, : self.prompt_length].sum(-1).max())
            self.schedule = Schedule.create(self.policy.window(longest), self.policy.eviction_ratio)

    @property
    def holds_thoughts(self) -> bool:
        """Whether more than the prompt was seen."""
        return self.prompt_length is not None and self.get_seq_length() > self.prompt_length

    @property
    def stored_length(self) -> int:
        """Number of slots in use."""
        return self.positions.length

    @property
    def in_lockstep(self) -> bool:
        """Whether all rows store the same columns: the prefix, and thoughts that are evicted together."""
        return self.columns.data is None

    @property
    def prefix(self) -> int:
        """What is never evicted, for rows in lockstep: columns of the prompt, or the first tokens."""
        return self.policy.prefix(self.prompt_length or 0)

    @uncompiled
    def room(self) -> int:
        """How many columns can be stored before room has to be made (eviction.py).

        Without a look at the mask, so that it may be less than there is where padding comes in.
        """
        if self.schedule is None:  # in the prompt, with window_size="prompt": nothing to evict yet
            return self.prompt_length - self.get_seq_length()
        if self.in_lockstep:
            return self.schedule.room(self.stored_length - self.prefix)
        return min(self.columns_left, self.limit - self.stored_length)

    def checked(self, mask: torch.Tensor | None, new_length: int) -> torch.Tensor:
        """The mask. Raises: ValueError: it does not cover what was seen and `new_length` columns more."""
        seen, end = self.get_seq_length(), self.get_seq_length() + new_length
        if mask is None or mask.shape[1] < end:
            raise ValueError(
                f"`attention_mask` {'is missing' if mask is None else f'covers {mask.shape[1]} columns'}, but the "
                f"cache has seen {seen} columns with padding and the input brings {new_length}: pass the mask of all "
                f"{end} columns, evicted tokens included."
            )
        return mask

    def is_whole(self, mask: torch.Tensor | None) -> bool:
        """Whether rows in lockstep store no padding among what counts as tokens, and none comes next."""
        if mask is None:
            return True
        whole = mask[:, self.prefix + self.evicted[0] : self.get_seq_length() + 1].all()
        if self.policy.retained_prefix != "prompt":
            whole = whole & mask[:, : self.prefix].all()
        return bool(whole)

    def tally(self, mask: torch.Tensor | None, schedule: Schedule) -> Tally:
        """Count the tokens in all slots. From now on rows are not in lockstep.

        `mask`: [B, seen + 1 or more], of the columns that come next too. `schedule`: the cache's own.
        """
        mask, seen = self.checked(mask, 1), self.get_seq_length()
        if self.in_lockstep:
            columns = torch.arange(seen, device=mask.device)
            columns = torch.cat([columns[: self.prefix], columns[self.prefix + self.evicted[0] :]])
            self.columns.append(columns[None, None, :, None].expand(mask.shape[0], -1, -1, -1), 0)
        columns = self.columns.view[:, 0, :, 0]
        held = visible(mask, columns).bool()
        if self.policy.retained_prefix == "prompt":
            kept = (held & (columns < self.prompt_length)).sum(-1)
        else:
            kept = torch.full((len(columns),), self.policy.retained_prefix, device=columns.device)
        return Tally(held, kept, mask[:, seen : seen + schedule.window].bool(), schedule)

    @uncompiled
    def close_gaps(self, tally: Tally) -> None:
        """Forget thoughts that have left, and move what remains of every row to its end."""
        remaining = tally.remaining()
        kept = [total - thoughts for total, thoughts in zip(tally.totals, tally.thoughts)]
        self.limit = max(kept) + tally.window + slack(tally.window)
        is_used_up = self.stored_length >= self.limit
        move = tally.move(max(remaining) if is_used_up else self.stored_length)
        if move is not None:
            for slots in (self.columns, self.positions, *self.slots()):
                slots.rearrange(move.index, move.rows)
            part = self.columns.view[:, 0, : move.index.shape[1], 0]
            if move.rows is None:
                part.masked_fill_(move.empty, EMPTY)
            else:
                part.index_copy_(0, move.rows, part.index_select(0, move.rows).masked_fill_(move.empty, EMPTY))
        self.lead = [self.stored_length - count for count in remaining]
        self.columns_left = tally.columns
        self.evicted = [
            evicted + tally.num_evicted * is_full for evicted, is_full in zip(self.evicted, tally.full, strict=True)
        ]

    def slots(self) -> list[SlotBuffer]:
        """Keys and values of all layers."""
        return [buffer for layer in self.layers for buffer in (layer.key_slots, layer.value_slots)]

    @uncompiled
    def compact_mask(self, mask: torch.Tensor | None, new_length: int) -> torch.Tensor | None:
        """The caller's mask [B, seen + new_length] without evicted columns: [B, stored + new_length]."""
        if mask is None and self.in_lockstep and not self.has_padding:
            return None
        seen, end = self.get_seq_length(), self.get_seq_length() + new_length
        mask = self.checked(mask, new_length)
        if self.in_lockstep:
            return stored_columns(mask, self.prefix, self.evicted[0], end)
        return torch.cat([visible(mask, self.columns.view[:, 0, :, 0]), mask[:, seen:end]], dim=1)

    @uncompiled
    def begin_step(self, positions: torch.Tensor) -> None:
        """Note the absolute positions [B, q] of the tokens that the layers are about to store."""
        if self.in_lockstep:
            self.limit = self.schedule.window + self.prefix if self.schedule else 0
        else:
            seen, new_length = self.get_seq_length(), positions.shape[1]
            columns = torch.arange(seen, seen + new_length, device=self.columns.storage.device)
            self.columns.append(columns[None, None, :, None].expand(len(positions), -1, -1, -1), self.limit)
            self.columns_left -= new_length
        for layer in self.layers:
            layer.limit = self.limit
        self.positions.append(positions[:, None, :, None], self.limit)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where queries stand among the stored slots; the causal mask is made in this compact index space."""
        if not self.is_bound:
            return super().get_query_offset(layer_idx)
        return self.layers[layer_idx].key_slots.length

    @property
    def num_evicted(self) -> list[int]:
        """Tokens evicted so far, for each row."""
        return list(self.evicted)

    @property
    def nbytes(self) -> int:
        """Bytes held by keys, values, positions and states.

        Constant from the first eviction on; they grow once more, a little, should rows leave lockstep later.
        """
        if not self.is_bound:
            return 0
        return self.positions.nbytes + self.columns.nbytes + sum(layer.nbytes for layer in self.layers)

    def state_norms(self) -> dict[str, torch.Tensor]:
        """Frobenius norm of the state that each layer uses, by adapter: [layers, B], NaN for layers without adapter."""
        norms = {}
        for name in self.adapters:
            nan = torch.full((len(self.lead),), float("nan"))
            per_layer = [layer.states.get(name) for layer in self.layers]
            norms[name] = torch.stack(
                [nan if s is None else torch.linalg.matrix_norm(s).detach().float().cpu() for s in per_layer]
            )
        return norms

    def _select_rows(self, index: torch.Tensor) -> None:
        for layer in self.layers:
            layer.select(index)
        self.positions.select(index)
        self.columns.select(index)
        rows = index.tolist()
        self.evicted, self.lead = ([values[row] for row in rows] for values in (self.evicted, self.lead))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows, for beam search."""
        if not self.is_bound:
            return super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, to sample several continuations of one prefill."""
        if not self.is_bound:
            return super().batch_repeat_interleave(repeats)
        self._select_rows(torch.arange(len(self.evicted)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows, by index or boolean mask."""
        if not self.is_bound:
            return super().batch_select_indices(indices)
        self._select_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        """Empty the cache and forget the policy; the next use binds it again."""
        super().__init__()
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: see `refuse_rollback`."""
        if tokens_to_remove:
            refuse_rollback()

    def activate_past_recording(self) -> None:
        """Refused: see `refuse_rollback`."""
        refuse_rollback()
