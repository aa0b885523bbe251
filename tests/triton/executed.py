"""Runs Triton's kernels from the PTX that Triton makes of them, in the interpreter of `tests/cuda/ptx`.

`launch.py` stays as it is: its kernels are replaced by `Executed`, which gets the same grid, arguments and options as Triton
would, compiles for a card that is not there, and executes the result. Where Triton decides something by the arguments'
values (`specialized`), the same is decided here, so that the launcher's strides, grids and alignments are executed too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from tests.cuda.ptx.interpreter import Outcome, launch
from tests.cuda.ptx.program import Program, parse

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass
class Executed:
    """Stands in for a `triton.jit` function.

    Args:
        kernel: the function.
        sm: "sm80", …
        mutate: changes the PTX before it runs, for the controls.
    """

    kernel: Any
    sm: str = "sm80"
    mutate: Callable[[str], str] = lambda ptx: ptx
    outcomes: list[Outcome] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **named: self.run((*grid, 1, 1)[:3], args, named)

    def run(self, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = dict(zip(self.kernel.arg_names, args)) | {k: v for k, v in named.items() if k not in OPTIONS}
        source = ASTSource(self.kernel, *specialized(self.kernel, values))
        options = {k: v for k, v in named.items() if k in OPTIONS}
        compiled = compile(source, target=GPUTarget("cuda", int(self.sm[2:]), 32), options=options)
        program = parse(self.mutate(compiled.asm["ptx"]), self.kernel.fn.__name__)
        passed = [values[name] for name, kind in source.signature.items() if kind != "constexpr"]
        buffers = [t.view(torch.uint8).numpy().reshape(-1) for t in passed if isinstance(t, Tensor)]
        threads = 32 * compiled.metadata.num_warps
        x, y, z = grid
        self.outcomes.append(
            launch(program, (x, y, z), (threads, 1, 1), compiled.metadata.shared, packed(program, passed), buffers)
        )


def specialized(kernel: Any, values: dict[str, Any]) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes of a call, as Triton's launcher chooses them.

    An absent pointer and a number 1 are constants; addresses and numbers divisible by 16 are marked so, except where the
    kernel forbids it (`do_not_specialize`).
    """
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and free):
            signature[parameter.name], constants[place,] = "constexpr", value
            continue
        signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        if free and (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
            attributes[place,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def packed(program: Program, values: list[Any]) -> list[bytes]:
    """The parameters' bytes. Triton's last two are scratch memory that these kernels do not ask for: null."""
    made = [struct.pack("<q", v.data_ptr()) if isinstance(v, Tensor) else struct.pack("<i", v) for v in values]
    sizes = [size for _, size in program.parameters.values()][len(made) :]
    assert sizes == [8, 8], f"parameters behind the kernel's own: {sizes}"
    return [*made, bytes(8), bytes(8)]
