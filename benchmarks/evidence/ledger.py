"""A ledger told in words, for a real pretrained base: answers need results on the way, which have left the window.

    Ledger: | Now Tom has 47 coins. ... Then Tom gets 5 coins and has 52 coins. ... | text on Python |
    Later: Then Tom loses 3 coins and has 49 coins. ...

Each person has an account. In every round each of them gets or loses some coins, in an order of its own, and what they
have then is to be said. From the second change on that needs what was said of them in the round before.
"""

from __future__ import annotations

import torch

from notes import VERBS, NotesOfAnyWord, Said, Wording
from streams import Parts, shuffled

OPENING = Said("Now{name} has {number} coins.\n", 9)
CHANGE = Said("Then{name}{verb} {change} coins and has {number} coins.\n", 14)
LEDGER = Wording(Said("Ledger:\n", 4), Said("\nLater:\n", 4), (OPENING, CHANGE))
LARGEST = 9  # change


class Ledger(NotesOfAnyWord):
    """Evidence: `people` with what they have, and `changes` rounds of changes. Another round is asked for.

    Answers are the digits of what they have after each change; those of the first one that is asked for are scored.
    """

    name = "ledger"
    wording = LEDGER
    prompt_length = LEDGER.prompt.length
    difficulty = dict(people=3, changes=1)

    def length(self, distance: int, **difficulty: int) -> int:
        given = self.completed(difficulty)
        rounds = OPENING.length + (given["changes"] + 1) * CHANGE.length
        return self.prompt_length + given["people"] * rounds + distance + self.wording.before_questions.length

    def fault(self, given: dict[str, int]) -> str:
        most = self.most_names
        fits = 1 <= given["people"] <= most and 0 <= given["changes"] <= 3
        return "" if fits else f"people must be 1 to {most} and changes 0 to 3"

    def write(self, size: int, generator: torch.Generator, given: dict[str, int]) -> Parts:
        words, people, rounds = self.words, given["people"], given["changes"] + 1
        opening, change = words.sentences
        name = words.names[shuffled(size, len(words.names), generator, people)]
        reach = LARGEST * rounds  # whatever happens, numbers have two digits
        has = torch.randint(10 + reach, 100 - reach, (size, people), generator=generator)
        said = [opening.filled(name=name, **words.number(has))]
        for _ in range(rounds):
            amount = torch.randint(1, LARGEST + 1, (size, people), generator=generator)
            verb = torch.randint(len(VERBS), (size, people), generator=generator)
            has = has + amount * (1 - 2 * verb)
            gaps = dict(name=name, verb=words.verbs[verb], change=words.digits[amount], **words.number(has))
            order = shuffled(size, people, generator)
            said.append(change.filled(**{gap: tokens.gather(1, order) for gap, tokens in gaps.items()}))
        *before, asked = said
        evidence_answers = [torch.zeros(people * OPENING.length, dtype=torch.bool)]
        evidence_answers += [change.is_number.repeat(people)] * (rounds - 1)
        evidence = torch.cat([sentences.flatten(1) for sentences in before], 1)
        return self.parts(evidence, torch.cat(evidence_answers), asked, change)


class TaughtLedger(Ledger):
    """The same for a base that can keep such accounts while it sees all of them: what is missing is memory alone.

    So a reasoning model stands before its thoughts leave. The checkpoint learns it (LoRA, merged, and then frozen).
    """

    name = "ledger_taught"
    is_taught = True
    settings = Ledger.settings | dict(base_steps=400, steps=300, learning_rate=2e-3)
