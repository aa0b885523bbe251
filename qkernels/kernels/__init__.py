"""The catalogue of kernels, and the loader of the compiled ones."""
