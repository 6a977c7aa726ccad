"""Makes "PTE" a member of `peft.PeftType` from outside of PEFT, which has no plugin mechanism of its own."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "PTE"
# transformers derives an adapter's parameter prefix as `peft_type.lower() + "_"`, so this is not a free choice.
PREFIX = "pte_"


def ensure_peft_type() -> PeftType:
    """Return `PeftType.PTE`, adding the member to the enum on the first call.

    Enums are closed, but `PeftType` is a plain `str` enum whose tables can be extended; the last line is what makes
    the attribute access `PeftType.PTE` work on Python 3.12 and later.
    """
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT once; a repeated import is harmless.

    Raises:
        ImportError: another package has already registered a PEFT method called "PTE".
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(ensure_peft_type())
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
    elif known.__module__.partition(".")[0] != __name__.partition(".")[0]:
        raise ImportError(
            f"The PEFT type '{NAME}' is already registered by '{known.__module__}'. Two packages cannot provide it in "
            "one process: uninstall or do not import one of them."
        )
