"""PTE under vLLM: every request carries its bounded cache and its state. See docs/vllm.md."""

from .folder import export, overrides
from .update import update_adapter

__all__ = ["export", "overrides", "update_adapter"]
