"""Whole decoders of random weights: tokens a second, memory, and llama.cpp beside ours on the same codes."""
