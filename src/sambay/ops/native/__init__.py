"""The C++ kernels for the CPU, compiled at first use."""
