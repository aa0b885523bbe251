"""Limits of formats and kernels, and weights that are not quantized, are named before the work begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qkernels import AWQ, GPTQ, RTN
from qkernels.calibrate import preview
from qkernels.errors import ConversionError, QKernelsError, UnsupportedProblem
from qkernels.quantizers import InputStatistics
from tests.tiny_models import loud_model, run, token_windows

pytest.importorskip("transformers")


def test_limits_of_shapes_are_asked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming layer, limit and way out; in the preview too."""
    loud_model().save_pretrained(tmp_path / "source")
    monkeypatch.setattr(InputStatistics, "update", lambda *args: pytest.fail("the work has begun"))
    directory = {"save_to": tmp_path / "out"}
    awq = {"calibration": token_windows(), "format": "awq"}
    for call, options in ((run, awq | directory), (preview, {"format": "awq"})):
        with pytest.raises(
            ConversionError, match=r"q_proj: awq .*K=32 is no.* of group_size 24.*change its group size"
        ):
            call(tmp_path / "source", AWQ(4, 24), **options)
    for call, options in ((run, {"on_unsupported": "raise", **directory}), (preview, {})):
        with pytest.raises(
            UnsupportedProblem, match=r"q_proj: no kernel of any machine takes w8a8_g7, N=32(.|\n)*128, 64, 32"
        ):
            call(tmp_path / "source", RTN(8, 7, act="int8"), **options)
    with pytest.raises(ConversionError, match=r"q_proj: awq .*K=32 is not a multiple"):
        run(loud_model(), AWQ(4, 24), format="awq", save_to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_without_a_kernel_here_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels of the GPU take it")
    loud_model().save_pretrained(tmp_path / "source")
    preview(tmp_path / "source", RTN(4, 7))
    assert "q_proj: no kernel of this machine takes w4a16_g7, N=32 K=32 (triton.kpack does)" in caplog.text


def test_fp8_weights_are_refused_by_name() -> None:
    model = loud_model()
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[1].mlp.up_proj.weight.data.to(
        torch.float8_e4m3fn
    )
    with pytest.raises(QKernelsError, match=r"up_proj.*float8_e4m3fn"):
        run(model, GPTQ(4, 16))
