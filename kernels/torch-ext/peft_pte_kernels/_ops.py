"""The namespace of the registered ops; `kernel-builder` writes a file of this name, with a unique namespace."""

import torch

NAMESPACE = "peft_pte_kernels"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """`encode` -> `peft_pte_kernels::encode`."""
    return f"{NAMESPACE}::{op_name}"
