"""Model cards that say how to load an adapter: without `import peft_pte`, PEFT does not know its type."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import ModelCard

CARD = "README.md"
BEGIN, END = "<!-- how to load this adapter, by peft_pte -->", "<!-- end of how to load -->"
TEMPLATE = """\
{begin}
## Loading this adapter

A [Progressive Thought Encoding](https://arxiv.org/abs/2602.16839) adapter of the package `peft-pte`. PEFT knows its
type after `import peft_pte`; without it, loading ends in `KeyError: 'PTE'`.

```python
import peft_pte  # registers "PTE" with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {adapter!r}{subfolder})
tokenizer = AutoTokenizer.from_pretrained({base!r})
```

Programs that do not import it: `python -m peft_pte script.py`, `python -m peft_pte -m module`,
`accelerate launch -m peft_pte script.py`.
{end}
"""


def name_of(folder: Path) -> str:
    """What an adapter in `folder` is loaded by, as far as it can be known while it is saved."""
    if Path(tempfile.gettempdir()).resolve() in folder.resolve().parents:
        return "this repository"  # `push_to_hub` saves to a folder that will be gone
    return next(part for part in reversed(folder.resolve().parts) if not part.startswith("_"))  # a staging folder


def add_loading_code(
    folder: str | Path, base: str | None, adapter: str | None = None, subfolder: str | None = None
) -> None:
    """Let the model card in `folder` begin with how to load the adapter. Nothing happens if there is no card.

    Args:
        base, adapter: names or paths of base model and adapter; None: not known, and what the folder is called.
        subfolder: where in `folder` the adapter lies, if not in itself.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        return
    card = ModelCard.load(path)
    before, _, rest = card.text.partition(BEGIN)
    _, _, after = rest.partition(END)
    loading = TEMPLATE.format(
        begin=BEGIN,
        end=END,
        base=base or "the base model",
        adapter=adapter or name_of(Path(folder)),
        subfolder="" if subfolder is None else f", subfolder={subfolder!r}",
    )
    card.text = f"{loading}\n{(before + after).strip()}\n"
    card.save(path)
