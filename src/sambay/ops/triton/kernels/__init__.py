"""Kernels. Only `sambay.ops.triton.launch` imports them, when one is launched."""
