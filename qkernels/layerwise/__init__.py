"""Quantize a decoder model layer by layer: what `qkernels.calibrate` is made of."""
