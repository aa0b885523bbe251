"""A quantizer is one file and one registration line (docs/adding-a-quantizer.md): this file is the file of two toys.

One looks at weights alone, one needs calibration, folds scales and gives up on some layers. Neither is known by name to what
runs them: `quantize`, its preview, the formats and the command line.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qkernels import QuantTensor, load, quantize, replace_linear
from qkernels.calibrate import preview
from qkernels.cli.main import main, parser
from qkernels.errors import ArgumentError, CalibrationError
from qkernels.quantizers import QUANTIZERS, Options, rounding_of
from qkernels.quantizers.grid import checked_weight
from qkernels.quantizers.options import Needs, ScaleRule
from tests.tiny_models import loud_model, run, token_windows

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Power(Options):
    """8 bits a channel, and the scale the next power of two."""

    bits: int = 8
    group_size: Any = "channel"
    integer_zeros: ClassVar[bool] = False

    def quantize(self, weight: Tensor, moments: Tensor | None = None, name: str = "weight") -> QuantTensor:
        values = checked_weight(weight, name)
        scales = torch.exp2(torch.ceil(torch.log2(values.abs().amax(-1, keepdim=True) / 127)))
        codes = (values / scales).round() + self.scheme.mid_code
        return QuantTensor(codes.to(torch.uint8), scales, None, None, self.scheme)


@dataclass(frozen=True)
class Halves(Options):
    """Scales of 2 on every channel, folded; gives up on layers whose name it does not like."""

    needs: ClassVar[Needs] = "moments"
    bits: int = 8
    act_order: str = "never"

    def quantize(self, weight: Tensor, moments: Tensor | None = None, name: str = "weight") -> QuantTensor:
        assert moments is not None
        assert moments.shape == (weight.shape[1],) * 2
        if name.endswith("down_proj.weight"):
            raise CalibrationError(f"{name} is not to my taste")
        return rounding_of(self).quantize(weight, name=name)

    def scale_rule(self) -> ScaleRule:
        return self

    def scales(self, largest_input: Tensor, largest_weight: Tensor) -> Tensor:
        assert largest_input.shape == largest_weight.shape
        return torch.full_like(largest_input, 2.0)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZERS, Power().name, Power)  # the one line
    monkeypatch.setitem(QUANTIZERS, Halves().name, Halves)


def test_weights_alone_are_enough_for_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In memory, by `replace_linear`, and from the command line without calibration: the same weights."""
    model = loud_model()
    model.save_pretrained(tmp_path / "source")
    assert main(["quantize", str(tmp_path / "source"), str(tmp_path / "out"), "--method", "power"]) == 0
    assert "power w8a16_channel: 14 layers quantized" in capsys.readouterr().out
    replaced = loud_model()
    replace_linear(replaced, "w8a16_channel", method=Power(), progress=False)
    report = quantize(model, Power(), progress=False)
    assert {(module.method, module.scheme, module.error_of) for module in report.modules} == {
        ("power", "w8a16_channel", "weight")
    }
    expected, made = model.state_dict(), load(tmp_path / "out").state_dict()
    scales = expected["model.layers.0.mlp.up_proj.scales"]
    assert torch.equal(scales, torch.exp2(torch.log2(scales).round()))
    for name, tensor in expected.items():
        assert torch.equal(tensor, made[name]), name
        assert torch.equal(tensor, replaced.state_dict()[name]), name


def test_the_second_is_calibrated_folds_and_falls_back(tmp_path: Path) -> None:
    model, original = loud_model(), loud_model()
    with pytest.raises(CalibrationError, match="this method needs calibration"):
        run(model, Halves(), calibration=None)
    with pytest.raises(
        ArgumentError, match=r"Halves folds scales into .* no block of BloomForCausalLM lets one through"
    ):
        run(loud_model("bloom", apply_residual_connection_post_layernorm=True), Halves())
    report = run(model, Halves(group_size=16))
    fallen = {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert report.fallbacks == {name: f"{name}.weight is not to my taste" for name in fallen}
    assert {module.method for module in report.modules if module.name not in fallen} == {"halves"}
    assert {module.method for module in report.modules if module.name in fallen} == {"rtn"}
    assert {module.error_of for module in report.modules} == {"output"}
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(model.state_dict()[norm], original.state_dict()[norm] / 2)
    ids = token_windows(4)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=0.05)
    original.save_pretrained(tmp_path / "source")
    previewed = preview(tmp_path / "source", Halves(group_size=16), samples=24, seq_len=16)
    assert previewed.host_bytes > 0
    assert previewed.method == "halves"


def test_the_command_line_asks_the_registry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["quantize", "--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--method {rtn,gptq,awq,hqq,nf4,smoothquant,power,halves}" in shown
    assert "rtn, hqq, nf4 and power need no calibration" in shown
    assert "like what the model will see (gptq, awq, smoothquant, halves)" in shown
    assert "integer zero points (rtn, gptq, awq, smoothquant, halves)" in shown
    command = ["quantize", "a", "b", "--method", "power"]
    assert main([*command, "--asym"]) == 1
    assert (
        "--asym gives rtn, gptq, awq, smoothquant and halves integer zero points; power has" in capsys.readouterr().err
    )
    assert main([*command, "--act-order", "group"]) == 1
    assert "--act-order is an option of gptq and halves, got --method power" in capsys.readouterr().err
    with pytest.raises(
        ArgumentError, match=r"NF4\(…\), Power\(…\), GPTQ\(…\), .*, SmoothQuant\(…\) or Halves\(…\), got 3"
    ):
        quantize(loud_model(), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*QUANTIZERS, "power", "halves"])
def test_every_method_has_the_one_signature(name: str) -> None:
    method, weight = QUANTIZERS[name](), torch.randn(8, 128)
    assert method.name == name
    made = method.quantize(weight, torch.eye(128), "layers.0.mlp.up_proj.weight")
    assert made.scheme == method.scheme
    alone = rounding_of(method)
    assert alone.needs == "weight"
    assert alone.scheme == method.scheme
    assert torch.equal(alone.quantize(weight).codes, alone.quantize(weight, torch.eye(128)).codes)
    assert method.folds == (method.scale_search() is not None or method.scale_rule() is not None)
    assert json.dumps(repr(method))


# --- nobody asks for a class, nor keeps a list of names -------------------------------------------------------------------

CLASSES = {"GPTQ", "AWQ", "SmoothQuant", "RTN", "HQQ", "NF4", "Power"}
CALIBRATED = {"gptq", "awq", "smoothquant"}


def special_cases(source: str) -> list[str]:
    """`isinstance` on a method's class, and literal lists with the names of all calibrated methods."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = {getattr(leaf, "id", getattr(leaf, "attr", "")) for leaf in ast.walk(node.args[1])}
            if asked & CLASSES:
                found.append(ast.unparse(node))
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)) and set(map(_constant, node.elts)) >= CALIBRATED:
            found.append(ast.unparse(node))
    return found


def _constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


@pytest.mark.parametrize("folder", ["qkernels", "benchmarks", "examples", "tools"])
def test_no_method_is_a_special_case(folder: str) -> None:
    paths = [path for path in (ROOT / folder).rglob("*.py") if (ROOT / "qkernels" / "quantizers") not in path.parents]
    assert paths
    assert {str(path.relative_to(ROOT)): cases for path in paths if (cases := special_cases(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "if isinstance(method, GPTQ): pass",
        "folds = isinstance(method, (AWQ, SmoothQuant))",
        "isinstance(method, RTN | HQQ)",
        "isinstance(method, quantizers.SmoothQuant)",
        'METHODS = ("rtn", "gptq", "awq", "hqq", "nf4", "smoothquant")',
        'method in ["gptq", "awq", "smoothquant"]',
    ],
)
def test_a_special_case_is_found(source: str) -> None:
    assert special_cases(source)
