"""Real text without a download: prose of the Python documentation that every Python carries, and notes to remember.

Another version of Python has a slightly different text.
"""

from __future__ import annotations

import random
from pydoc_data.topics import topics

NAMES = "Tom Anna Ben Clara David Emma Frank Grace Henry Jack Kate Leo Maria Nick Paul Rosa"
THINGS = "shells stamps coins books apples stones cards keys bottles boxes cups trees chairs hats maps boats"


def paragraphs(held_out: bool) -> list[str]:
    """The last quarter is for the evaluation.

    The documentation repeats itself, so paragraphs are taken once: none is on both sides.
    """
    found: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            words = paragraph.split()
            text = " ".join(words)
            is_prose = sum(c.isalpha() or c == " " for c in text) > 0.9 * len(text)
            if len(words) >= 12 and text.endswith((".", ":")) and is_prose:
                found[text] = None
    border = len(found) * 3 // 4
    return list(found)[border:] if held_out else list(found)[:border]


def pieces(held_out: bool, num_words: int) -> list[dict[str, str]]:
    """The text in rows of so many words."""
    words = " ".join(paragraphs(held_out)).split()
    return [dict(text=" ".join(words[i : i + num_words])) for i in range(0, len(words) - num_words + 1, num_words)]


def notes(held_out: bool, count: int, filler: tuple[int, int], facts: int = 2) -> list[dict[str, str]]:
    """Rows that need memory: facts, between so many and so many words of the text, and the facts again as answers.

    A held-out row ends with the answer to the first question. Its numbers and its text are others than in training; its
    names and things are not.
    """
    generator = random.Random(f"notes {held_out}")
    words, rows = " ".join(paragraphs(held_out)).split(), []
    for _ in range(count):
        names, things = (generator.sample(given.split(), facts) for given in (NAMES, THINGS))
        numbers = list(map(str, generator.sample(range(10, 100), facts)))
        lines = [f"The number of {t} of {n} is {x}." for t, n, x in zip(things, names, numbers)]
        length = generator.randint(*filler)
        start = generator.randint(0, len(words) - length)
        written = "\n".join(["Notes:", *lines, " ".join(words[start : start + length]), "", "Questions:", ""])
        order = generator.sample(range(facts), facts)
        if held_out:
            rows.append(dict(text=written + lines[order[0]], answer=numbers[order[0]]))
        else:
            rows.append(dict(text=written + "\n".join(lines[i] for i in order)))
    return rows
