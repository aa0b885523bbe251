"""Layers packed by AutoAWQ's WQLinear_GEMM, WQLinear_GEMV and WQLinear_GEMVFast. The gemm weights are those of its
dequantize_gemm; for the other two it has CUDA kernels only, so there they are (code - zero) * scale of the codes it was given.

pip install autoawq==0.2.9 (its last); python tests/golden/make_autoawq.py
"""

from __future__ import annotations

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast
from awq.utils.packing_utils import dequantize_gemm
from store import store

N, K, GROUP = 64, 128, 64
KINDS = {"gemm": WQLinear_GEMM, "gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast}


def main() -> None:
    for seed, (name, kind) in enumerate(KINDS.items()):
        g = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (N, K), generator=g)
        zeros = torch.randint(0, 16, (N, K // GROUP), generator=g)
        scales = (torch.rand(N, K // GROUP, generator=g) * 0.02 + 0.005).half()
        weight = (codes - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(GROUP, 1)
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = weight
        # gemm wants scales as [G, N]; the gemv layouts transpose by themselves
        turned = (scales.T.contiguous(), zeros.T.contiguous()) if name == "gemm" else (scales, zeros)
        packed = kind.from_linear(linear, 4, GROUP, False, *turned)
        back = weight.half()
        if name == "gemm":
            back = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP).T
        config = {"quant_method": "awq", "version": name, "bits": 4, "group_size": GROUP, "zero_point": True}
        tensors = {f"layers.0.{key}": tensor for key, tensor in packed.state_dict().items()}
        store(f"autoawq-{name}", tensors, {"layers.0": back}, config, ("autoawq",))


if __name__ == "__main__":
    main()
