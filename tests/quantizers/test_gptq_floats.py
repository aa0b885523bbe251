"""GPTQ on grids of floats and of products, whose scales are fixed beforehand: against the paper's equations in float64, and
written as compressed-tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qkernels import inspect, load, quantize
from qkernels.quantizers import GPTQ, RTN
from qkernels.scheme import CODEBOOKS
from tests.checkpoints import plain_checkpoint
from tests.quantizers.problems import output_error, problem

FLOATS = ["mxfp4_g32", "nvfp4_g16", "fp8_channel", "fp8_block32", "fp8_tensor"]


def swept(w: Tensor, hessian: Tensor, scales: Tensor, codebook: str, damping: float) -> Tensor:
    """float64 `[N, K]`: columns by falling energy, each rounded to the nearest entry times its scale, its error taken out of
    those to come by the inverse of the Hessian that is left (equations 2 and 3)."""
    table = torch.tensor(CODEBOOKS[codebook], dtype=torch.float64)
    table = table[table.isfinite()]
    work, result = w.double().clone(), torch.empty(w.shape, dtype=torch.float64)
    h = hessian + torch.eye(len(hessian), dtype=torch.float64) * damping * hessian.diagonal().mean()
    left = torch.argsort(h.diagonal(), descending=True, stable=True).tolist()
    while left:
        column, inverse = left[0], torch.linalg.inv(h[left][:, left])
        entries = table * scales[:, column, None].double()
        near = entries.gather(1, (entries - work[:, column, None]).abs().argmin(1, keepdim=True))[:, 0]
        result[:, column] = near
        error = (work[:, column] - near) / inverse[0, 0]
        work[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return result


@pytest.mark.parametrize("scheme", FLOATS)
@pytest.mark.parametrize("act_order", ["group", "static"])
def test_weights_are_those_of_the_equations(scheme: str, act_order: str) -> None:
    w, hessian = problem(24, 96)
    method = GPTQ(clip="none", act_order=act_order).with_scheme(scheme)  # type: ignore[arg-type]
    found, rounded = method.quantize(w, hessian), RTN().with_scheme(scheme).quantize(w)
    assert found.group_index is None
    assert not method.orders_columns
    assert torch.equal(found.scales.float(), rounded.scales.float())  # fixed beforehand
    scales = found.scales.float()[:, found.column_groups()]
    expected = swept(w, hessian, scales, str(method.codebook), method.damping)
    assert torch.equal(found.dequantize(torch.float64), expected)
    assert output_error(found, w, hessian) < 0.8 * output_error(rounded, w, hessian)


@pytest.mark.parametrize("scheme", ["nvfp4_g16", "q4_k", "q6_k", "iq4_xs"])
@pytest.mark.parametrize("act_order", ["none", "group", "static"])
def test_products_keep_their_factors(scheme: str, act_order: str) -> None:
    w, hessian = problem(16, 256)
    found = GPTQ(act_order=act_order).with_scheme(scheme).quantize(w, hessian)  # type: ignore[arg-type]
    assert found.factors is not None
    rounded = RTN(clip="mse").with_scheme(scheme).quantize(w)
    assert output_error(found, w, hessian) < output_error(rounded, w, hessian)


@pytest.mark.parametrize("scheme", ["mxfp4_g32", "nvfp4_g16", "fp8_block32", "w8a8w_channel"])
def test_written_as_compressed_tensors(scheme: str, tmp_path: Path) -> None:
    method = GPTQ(act_order="group" if scheme != "w8a8w_channel" else "static").with_scheme(scheme)
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    quantize(
        plain_checkpoint(tmp_path / "plain"), method, calibration=ids, save_to=tmp_path / "out",
        format="compressed-tensors", progress=False,
    )  # fmt: skip
    assert inspect(tmp_path / "out").schemes == {scheme: 14}
    assert str(load(tmp_path / "out").get_submodule("model.layers.0.mlp.up_proj").scheme) == scheme
