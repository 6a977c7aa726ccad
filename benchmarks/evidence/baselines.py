"""What the field does with as much cache and no training: text carried across chunks, and a cache that is compressed.

Both read a stream as it would be decoded, and answer what `training.loss_and_hits` answers for the other arms.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

from streams import Stream, answers


def slots(model: torch.nn.Module, prompt_length: int, window_size: int, rank: int) -> int:
    """Tokens whose keys and values take the bytes that PTE keeps of a sequence: prompt, window, states in float32.

    A state is what is carried, with the last key of the convolution, and what is read of it.
    """
    config = model.config
    in_slot = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    of_states = ((rank + 1) * rank + rank * rank) * torch.float32.itemsize
    return prompt_length + window_size + -(-of_states // in_slot)


def given_again(length: int, prompt_length: int, capacity: int, carried: int) -> int:
    """Where the text begins that is read behind the prompt when `length` tokens have been written.

    A chunk is full when it has `capacity` tokens, prompt included. The next one begins with the prompt and the last
    `carried` tokens.
    """
    start = prompt_length
    while length - start > capacity - prompt_length:
        start += capacity - prompt_length - carried
    return start


@torch.no_grad()
def delethink(
    model: torch.nn.Module, stream: Stream, prompt_length: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of thinking: when one is full, the prompt and the last half of what fits are read anew, all else is gone.

    So a new chunk is made as often as half of the window is evicted (Delethink, arXiv 2510.06557).
    """
    columns = stream.scored[0].nonzero()[:, 0]
    ids, carried, logits = stream.input_ids, (capacity - prompt_length) // 2, []
    for column in columns.tolist():
        start = given_again(column, prompt_length, capacity, carried)
        read = torch.cat([ids[:, :prompt_length], ids[:, start:column]], 1)
        logits.append(model(input_ids=read, use_cache=False, logits_to_keep=1).logits)
    return answers(torch.cat(logits, 1), stream.input_ids, columns)


@torch.no_grad()
def compressed(
    press: str, model: torch.nn.Module, stream: Stream, prompt_length: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache that kvpress compresses while decoding, each time it has `capacity` tokens, by three eighths.

    `press`: kvpress' class that says which tokens are kept. It does not spare the prompt.
    """
    try:
        import kvpress
    except ImportError as error:
        needed = "pip install --no-deps kvpress==0.5.5 cachetools==5.5.2 fire==0.6.0 termcolor six"
        raise ImportError(f"{press} is of kvpress, whose limits on transformers are too narrow: {needed}") from error
    columns = stream.scored[0].nonzero()[:, 0]
    interval = max(1, capacity * 3 // 8)
    compressing = kvpress.DecodingPress(
        getattr(kvpress, press)(), compression_interval=interval, target_size=capacity - interval
    )
    cache, logits = DynamicCache(config=model.config), []
    with compressing(model):
        places = torch.arange(int(columns.max()))
        for place in (places[:prompt_length], *places[prompt_length:].split(1)):
            # kvpress takes the step from `cache_position`. Positions go on where keys are gone.
            output = model(
                input_ids=stream.input_ids[:, place],
                position_ids=place.expand(len(stream.input_ids), -1).to(model.device),
                past_key_values=cache,
                cache_position=place.to(model.device),
                use_cache=True,
                logits_to_keep=1,
            )
            if place[-1] + 1 in columns:
                logits.append(output.logits)
    return answers(torch.cat(logits, 1), stream.input_ids, columns)
