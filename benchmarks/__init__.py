"""The benchmark suite: kernels beside their peers, whole models, quality, all from one source tree.

    qkernels bench                           a quick set in under a minute
    python -m benchmarks                     the full set (make bench)
    python -m benchmarks.method.report       results -> a page with plots
    python -m benchmarks.method.age          how far each result lies behind the tree (make results-check)

Houses: `peers` (one adapter a file) and `method` (how anything is measured and kept) on the ground; `kernels` stands on them,
`models` on `kernels`; `quality` is apart and needs `method` alone. `tests/benchmarks/test_houses.py` holds that.

Method: docs/benchmarking.md. A row is measured beside its peers in the same rounds, on the same inputs, and only after its
output was compared with `QuantTensor.dequantize()`: no match, no number. Every result file has one form (`method/envelope.py`).
"""
