"""`PTECache`: the bounded KV cache, [retained prefix | retained thoughts], and everything a sequence carries.

All runtime state of a generation lives here, so that two generations on one model do not notice each other.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..compiling import uncompiled
from ..config import CachePolicy
from .layers import PTECacheLayer, refuse_rollback
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
            results up to rounding. A new graph is made for each cache after a few steps. None: as `PTECache.cuda_graph`
            says, which also holds for caches that `generate` makes: off, unless you set it.
    """

    cuda_graph = False

    def __init__(self, cuda_graph: bool | None = None) -> None:
        super().__init__()
        if cuda_graph is not None:
            self.cuda_graph = cuda_graph
        self._clear()

    def _clear(self) -> None:
        self.policy: CachePolicy | None = None
        self.adapters: tuple[str, ...] = ()
        self.schedule: Schedule | None = None  # known when the prompt is complete, for window_size="prompt"
        self.prompt_length: int | None = None
        self.positions = SlotBuffer()  # [B, 1, slots, 1], absolute position of every stored token
        # Per row: empty slots in front, length of the retained prefix, thoughts evicted. Rows differ only for an
        # integer `retained_prefix` with left padding, where the first tokens stand in different columns.
        self.lead: list[int] = []
        self.prefix: list[int] = []
        self.evicted: list[int] = []
        self.padding: list[int] = []

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
        return self.policy is not None

    @uncompiled
    def bind(self, policy: CachePolicy, adapters: tuple[str, ...], num_layers: int, batch_size: int) -> None:
        """Fix policy and adapters at first use; later, check that they are still the same."""
        if not self.is_bound:
            self.policy, self.adapters = policy, adapters
            self.layer_class_to_replicate = None
            self.layers = [PTECacheLayer() for _ in range(num_layers)]
            self.lead, self.prefix = [0] * batch_size, [0] * batch_size
            self.evicted, self.padding = [0] * batch_size, [0] * batch_size
        if (self.policy, self.adapters) != (policy, adapters):
            raise ValueError(
                f"`past_key_values` was filled with adapter(s) {list(self.adapters)} active and the cache policy "
                f"{self.policy}, but now {list(adapters)} with {policy} are. A cache cannot change hands: start a new "
                "one."
            )
        if len(self.lead) != batch_size:
            raise ValueError(
                f"`past_key_values` holds {len(self.lead)} rows, but the input has {batch_size}. Use "
                "`batch_repeat_interleave` or `batch_select_indices` to change the number of rows."
            )

    @uncompiled
    def begin_prompt(self, mask: torch.Tensor | None, new_length: int, prompt_length: int | None) -> None:
        """Tell the cache, before its first tokens and while the prompt comes in, where prompt and prefix end.

        Args:
            mask: [B, seen + new_length], 0 on padding, or None.
            new_length: number of tokens that this call brings.
            prompt_length: columns of the whole prompt if known; else the first call brings the whole prompt.
        """
        seen = self.get_seq_length()
        if self.prompt_length is None:
            self.prompt_length = seen + new_length if prompt_length is None else prompt_length
        if self.policy.retained_prefix == "prompt":
            self.prefix = [self.prompt_length] * len(self.prefix)
        else:
            self.prefix = [self.policy.retained_prefix] * len(self.prefix)
            waiting = [row for row, padding in enumerate(self.padding) if padding == seen]  # no token so far
            if waiting and mask is not None:
                leading = (mask[:, seen:].cumsum(-1) == 0).sum(-1).tolist()
                for row in waiting:
                    self.lead[row] += leading[row]
                    self.padding[row] += leading[row]
        window = self.policy.window_size
        if self.schedule is None and (window != "prompt" or seen + new_length >= self.prompt_length):
            if window == "prompt":
                longest = self.prompt_length if mask is None else int(mask[:, : self.prompt_length].sum(-1).max())
                window = max(1, longest)
            self.schedule = Schedule.create(window, self.policy.eviction_ratio)

    @property
    def stored_length(self) -> int:
        """Number of slots in use."""
        return self.positions.length

    @property
    def in_lockstep(self) -> bool:
        return len({*zip(self.lead, self.prefix)}) == 1

    def num_thoughts(self, row: int) -> int:
        return self.stored_length - self.lead[row] - self.prefix[row]

    @uncompiled
    def room(self) -> int:
        """How many tokens all rows can take before one of them must evict; only after `evict`."""
        if self.schedule is None:  # in the prompt, with window_size="prompt": nothing to evict yet
            return self.prompt_length - self.get_seq_length()
        return min(self.schedule.room(self.num_thoughts(row)) for row in range(len(self.lead)))

    @uncompiled
    def compact_mask(self, mask: torch.Tensor | None, new_length: int) -> torch.Tensor | None:
        """The caller's mask [B, seen + new_length] without evicted columns: [B, stored + new_length]."""
        if mask is None and not any(self.lead):
            return None
        seen, end = self.get_seq_length(), self.get_seq_length() + new_length
        if mask is None or mask.shape[1] < end:
            raise ValueError(
                f"`attention_mask` {'is missing' if mask is None else f'covers {mask.shape[1]} columns'}, but the "
                f"cache has seen {seen} columns with padding and the input brings {new_length}: pass the mask of all "
                f"{end} columns, evicted tokens included."
            )
        if len(set(self.padding)) == 1:
            return stored_columns(mask, self.padding[0] + self.prefix[0], self.evicted[0], end)
        columns, empty = [], []
        for row, (lead, prefix, padding) in enumerate(zip(self.lead, self.prefix, self.padding)):
            lead = min(lead, self.stored_length + new_length)  # the row's padding may still be coming in
            thoughts = range(padding + prefix + self.evicted[row], end)
            columns.append([0] * lead + list(range(padding, min(padding + prefix, end))) + list(thoughts))
            empty.append([True] * lead + [False] * (len(columns[-1]) - lead))
        index = torch.tensor(columns, device=mask.device)
        return mask.gather(1, index).masked_fill(torch.tensor(empty, device=mask.device), 0)

    @uncompiled
    def begin_step(self, positions: torch.Tensor) -> None:
        """Note the absolute positions [B, q] of the tokens that the layers are about to store."""
        limit = (self.schedule.window + max(map(sum, zip(self.lead, self.prefix)))) if self.schedule else 0
        for layer in self.layers:
            layer.limit = limit
        self.positions.append(positions[:, None, :, None], limit)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where queries stand among the stored slots; the causal mask is made in this compact index space."""
        if not self.is_bound:
            return super().get_query_offset(layer_idx)
        return self.layers[layer_idx].key_slots.length

    @property
    def num_evicted(self) -> list[int]:
        """Thoughts evicted so far, for each row."""
        return list(self.evicted)

    @property
    def nbytes(self) -> int:
        """Bytes held by keys, values, positions and states; constant from the first eviction on."""
        if not self.is_bound:
            return 0
        return self.positions.nbytes + sum(layer.nbytes for layer in self.layers)

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
        rows = index.tolist()
        for name in ("lead", "prefix", "evicted", "padding"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows, for beam search."""
        if not self.is_bound:
            return super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, to sample several continuations of one prefill."""
        if not self.is_bound:
            return super().batch_repeat_interleave(repeats)
        self._select_rows(torch.arange(len(self.lead)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows, by index or boolean mask."""
        if not self.is_bound:
            return super().batch_select_indices(indices)
        self._select_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        """Empty the cache and forget the policy; the next use binds it again."""
        self.__init__(self.cuda_graph)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: see `refuse_rollback`."""
        if tokens_to_remove:
            refuse_rollback()

    def activate_past_recording(self) -> None:
        """Refused: see `refuse_rollback`."""
        refuse_rollback()
