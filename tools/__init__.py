"""Tools of the source tree that need no GPU: the guard of compiled figures, and what nvcc makes of the CUDA kernels."""
