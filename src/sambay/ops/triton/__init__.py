"""The GPU kernels in Triton, and the one place that loads them.

`kernels/` holds one file per operation; these import triton at their top, because a kernel's source
is compiled in the names of its module. `launch.py` imports them when the first one is launched, so
everything else here works without triton. With TRITON_INTERPRET=1 the kernels run on the CPU.
"""
