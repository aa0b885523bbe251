"""The catalogue of kernels, and the Triton kernels."""
