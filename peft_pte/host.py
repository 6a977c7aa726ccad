"""What the installed transformers calls the things that PTE meets, and which versions are known to work.

transformers 5.24 has renamed `past_key_values` to `cache`: in the forwards of models, layers and attention modules, in
`generate` and in outputs. Models with code of their own may lag behind. So the name is read from each signature,
callers may use either, and nothing else in this package spells it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .compiling import decides, uncompiled

# The oldest versions that the tests pass with, and the newest that was tried.
OLDEST = {"transformers": "5.16.1", "peft": "0.20.0"}
NEWEST_TRIED = {"transformers": "5.24.0", "peft": "0.21.2"}

CACHE_NAMES = ("cache", "past_key_values")  # the newest first


def installed_version(name: str) -> str | None:
    """None: on the path without being installed, so that what it can do will show."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_versions() -> None:
    """Refuse versions of the libraries underneath that are known not to work.

    Raises:
        ImportError: transformers or PEFT are too old; the message says which is installed, which is needed, and how to
            get it.
    """
    for name, oldest in OLDEST.items():
        installed = installed_version(name)
        if installed is not None and Version(installed) < Version(oldest):
            raise ImportError(
                f"peft_pte needs {name} {oldest} or later, but {installed} is installed: "
                f'`pip install --upgrade "{name}>={oldest}"`.'
            )


def versions() -> str:
    """The installed versions beside the known ones, for messages."""
    return ", ".join(
        f"{name} {installed_version(name) or '(unknown)'} (tried: {oldest} to {NEWEST_TRIED[name]})"
        for name, oldest in OLDEST.items()
    )


@dataclass
class DecoderOutput(BaseModelOutputWithPast):
    """What a decoder returns, of any family: mixtures of experts ask theirs for router logits."""

    router_logits: tuple[torch.Tensor, ...] | None = None


def cache_name_of(output_class: type) -> str | None:
    """The name of the field that holds the cache in a model output."""
    names = {field.name for field in fields(output_class)}
    return next((name for name in CACHE_NAMES if name in names), None)


CACHE_NAME = cache_name_of(BaseModelOutputWithPast) or CACHE_NAMES[0]  # of the installed transformers


@functools.cache
def cache_argument(function: Callable[..., Any]) -> str | None:
    """The name under which a forward or `generate` takes its cache; None if it takes none."""
    parameters = inspect.signature(function).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return CACHE_NAME if takes_any else None


def cache_in(arguments: dict[str, Any]) -> Cache | None:
    """The cache among the arguments of a call, under whichever name.

    Raises:
        ValueError: two different caches under two names.
    """
    given = [arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None]
    if len(given) == 2 and given[0] is not given[1]:
        raise ValueError(
            f"`{CACHE_NAMES[0]}` and `{CACHE_NAMES[1]}` are two names of one argument, but they were given two "
            "different caches. Pass one of them."
        )
    return given[0] if given else None


def rename_cache(arguments: dict[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a call with the cache under the name that `function` knows."""
    name = cache_argument(function)
    if name is None or not any(other in arguments for other in CACHE_NAMES if other != name):
        return arguments
    cache = cache_in(arguments)
    return {key: value for key, value in arguments.items() if key not in CACHE_NAMES} | {name: cache}


@uncompiled
def take_cache(arguments: dict[str, Any]) -> Cache | None:
    """As `cache_in`, and take it out of the arguments."""
    cache = cache_in(arguments)
    for name in CACHE_NAMES:
        arguments.pop(name, None)
    return cache


@decides
def call_with_cache(
    decoder: nn.Module, forward: Callable[..., BaseModelOutputWithPast], cache: Cache, **kwargs: Any
) -> BaseModelOutputWithPast:
    """Call the decoder's own `forward` (somebody's wrapper of it, maybe) with a cache."""
    name = cache_argument(type(decoder).forward) or CACHE_NAME  # `find_decoder` has seen that there is one
    return forward(**{name: cache}, **kwargs)


@uncompiled
def set_cache(output: Any, cache: Cache | None) -> None:
    """Put a cache into a model output, or take it out."""
    setattr(output, cache_name_of(type(output)) or CACHE_NAME, cache)
