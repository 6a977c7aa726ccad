"""Decoding under a cache of constant size: what it holds, when thoughts leave it, and its step as a CUDA graph."""

from .cache import PTECache

__all__ = ["PTECache"]
