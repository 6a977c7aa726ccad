"""Docstrings in Hugging Face's style, as mkdocstrings' Google parser wants them (see `mkdocs.yml`)."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import griffe

PUBLIC = ("Linear", "PTECache", "PTEConfig", "PTELayer", "PTEModel", "ThoughtEncoder")


def plain_type(match: re.Match[str]) -> str:
    """``name (`int` or `"prompt"`, *optional*):`` without markup: types are shown as code anyway."""
    return re.sub(r"\[?`~?([^`]*)`\]?|\*(optional)\*", r"\1\2", match[0])


def link(match: re.Match[str]) -> str:
    name = match[1].rpartition(".")[2]
    return f"[`{name}`][peft_pte.{name}]" if name in PUBLIC else f"`{name}`"


def translated(text: str) -> str:
    """The docstring with plain types, links to what this package has, and examples that are no section."""
    text = re.sub(r"^ +\w+ \(.*\):", plain_type, text, flags=re.MULTILINE)
    text = re.sub(r"\[`~?([\w.]+)`\](?![\[(])", link, text)
    return re.sub(r"(?<=^Example:\n\n)( +.*\n?|\n)+", lambda block: dedent(block[0]), text, flags=re.MULTILINE)


def one_a_line(text: str, parameters: list[str]) -> str:
    """Parameters that share a line, as `keys, values: ...` or `x: [B, T]. scaling: ...`, on lines of their own."""
    names = "|".join(map(re.escape, parameters))
    shared = rf"^( +)({names}), ({names}): (.*(?:\n\1 +.*)*)"
    text = re.sub(shared, r"\1\2: \4\n\1\3: \4", text, flags=re.MULTILINE)
    following = rf"^( +)((?:{names}): .*\.) ({names}): "
    for _ in parameters:
        text = re.sub(following, r"\1\2\n\1\3: ", text, flags=re.MULTILINE)
    return text


class HuggingFaceStyle(griffe.Extension):
    """Translates every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = translated(obj.docstring.value)
            if isinstance(obj, griffe.Function):
                obj.docstring.value = one_a_line(obj.docstring.value, [p.name for p in obj.parameters])
