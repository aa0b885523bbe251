"""The benchmark suite: kernels beside their peers, whole models, quality, all from one source tree.

    qkernels bench                       a quick set in under a minute
    python -m benchmarks                 the full set (make bench)
    python -m benchmarks.report          results -> a page with plots
    python -m benchmarks.gpu_check       everything worth doing when a GPU is at hand (make gpu-check)

Method: docs/benchmarking.md. A row is measured beside its peers in the same rounds, on the same inputs, and only after its
output was compared with `QuantTensor.dequantize()`: no match, no number.
"""
