"""One file for each op: Triton kernels, their launch, and the registered op with its gradient."""
