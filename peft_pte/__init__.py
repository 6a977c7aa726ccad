"""Progressive Thought Encoding (arXiv 2602.16839) as a PEFT method. Importing this package registers it with PEFT."""

from .host import check_versions

check_versions()  # before anything that an old version does not have

from .registration import ensure_peft_type, register  # noqa: E402  (see above)

ensure_peft_type()  # before the configuration, whose peft_type it is

from .cache.cache import PTECache  # noqa: E402  (the enum member must exist first)
from .config import PTEConfig  # noqa: E402
from .encoder import ThoughtEncoder  # noqa: E402
from .hooks.window import window  # noqa: E402
from .layer import Linear, PTELayer  # noqa: E402
from .model import PTEModel  # noqa: E402
from .pretrained import pretrained_config  # noqa: E402
from .replay.distillation import distillation_loss, sequence_divergence  # noqa: E402
from .replay.heads import sequence_logprobs, sequence_loss  # noqa: E402
from .replay.transfer import attention_loss, record_attention  # noqa: E402
from .static import export_lora  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Linear",
    "PTECache",
    "PTEConfig",
    "PTELayer",
    "PTEModel",
    "ThoughtEncoder",
    "attention_loss",
    "distillation_loss",
    "export_lora",
    "pretrained_config",
    "record_attention",
    "sequence_divergence",
    "sequence_logprobs",
    "sequence_loss",
    "window",
]

register(PTEConfig, PTEModel)
