"""Builds qkernels/_C.abi3.so: the CPU kernels, and the CUDA ones where there is a CUDA toolkit. Metadata: pyproject.toml.

    pip install . --no-build-isolation          python setup.py build_ext --inplace

One binary on torch's stable ABI for torch 2.10 and later, with no Python symbol in it. Environment:
    QKERNELS_CUDA=0           leave the CUDA kernels out
    QKERNELS_NO_EXTENSION=1   install the Python part alone
    TORCH_CUDA_ARCH_LIST      GPU architectures; the default is all that are supported
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
MACHINE = platform.machine()
# torch 2.10: without it the binary asks for the torch that it was built with
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# 8.6 and 8.9 run the code of 8.0 (decision 0020); cards of no family here (10.0, 10.3: B200, B300) compile its PTX, since PTX
# goes upwards only.
CUDA_ARCHITECTURES = "8.0+PTX;9.0a;12.0+PTX"


def packaged_cuda_homes() -> list[str]:
    """Where the packages of requirements-cuda.txt lie, latest first: site-packages/nvidia/cu13."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations or [] if spec else []
    return sorted((str(home) for folder in folders for home in Path(folder).glob("cu[0-9]*")), reverse=True)


def find_cuda_home() -> Path | None:
    """The directory with bin/nvcc and the CUDA headers. torch's own search takes the parent of whatever nvcc is in PATH, and a
    wrapper script there leads it astray."""
    from torch.utils import cpp_extension

    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), cpp_extension.CUDA_HOME, "/usr/local/cuda"]
    for home in (Path(place) for place in [*places, *packaged_cuda_homes()] if place):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def cpu_sources() -> list[str]:
    """Instruction sets choose their own targets (csrc/cpu/target.h); elsewhere than on x86 and aarch64 there is the scalar code
    alone."""
    names = [
        "between",
        "between_scalar",
        "bindings",
        "bindings_between",
        "bindings_experts",
        "bindings_gguf",
        "bindings_rounding",
    ]
    names += [
        "bindings_rows",
        "dispatch",
        "experts",
        "gemm",
        "gguf",
        "gguf_scalar",
        "rounding",
        "rounding_scalar",
        "scalar",
    ]
    names += ["scalar_int8"]
    if MACHINE in ("x86_64", "AMD64"):
        names += ["avx2", "avx2_int8", "avx512", "avx512_bf16", "avx512_vnni", "between_avx2", "between_avx512"]
        names += ["gguf_avx2", "gguf_avx512", "rounding_avx2", "rounding_avx512"]
    if MACHINE == "aarch64":
        names += ["neon", "neon_bf16", "neon_dotprod", "neon_i8mm", "neon_int8"]
    return ["csrc/exports.cpp", *(f"csrc/cpu/{name}.cpp" for name in names)]


def digest_of_headers() -> str:
    """Of those that CUDA files include."""
    headers = sorted(p for p in (*HERE.glob("csrc/*"), *HERE.glob("csrc/cuda/*")) if p.suffix in (".h", ".cuh"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in headers)).hexdigest()[:16]


def extension():  # type: ignore[no-untyped-def]
    """The one extension, and the command that builds it with ninja."""
    from torch.utils import cpp_extension

    # The two warnings that are off come from torch's headers and from gcc 12's own intrinsics.
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-maybe-uninitialized"]
    # Loops begin with a line of the instruction cache. Where the linker put them decided else: the int8 loop of Q4_K at 128
    # tokens took 1.41 times as long (Zen 4) in a library whose only difference was that something before it had grown.
    aligned = ["-falign-functions=64", "-falign-loops=64"]
    cxx = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", *aligned, *warnings, *DEFINES]
    if MACHINE == "aarch64":  # its plain code has fused multiply-adds, which round otherwise than that of x86
        cxx.append("-ffp-contract=off")
    # Torch has nvcc write down what a file includes only if torch itself is built for CUDA; so headers are in the command.
    nvcc = ["-O3", "-std=c++17", *DEFINES, f"-DQKERNELS_HEADERS={digest_of_headers()}"]
    options: dict[str, list[str]] = {"include_dirs": [str(HERE / "csrc")], "libraries": [], "library_dirs": []}
    sources = cpu_sources()
    cuda_sources = sorted(str(p.relative_to(HERE)) for p in HERE.glob("csrc/cuda/*") if p.suffix in (".cu", ".cpp"))
    home = find_cuda_home() if cuda_sources and os.environ.get("QKERNELS_CUDA") != "0" else None
    if home is not None:
        cpp_extension.CUDA_HOME = str(home)  # None on a CPU-only torch, even with CUDA_HOME in the environment
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)  # unset and no GPU: torch raises IndexError
        if "9.0a" in os.environ["TORCH_CUDA_ARCH_LIST"]:  # heuristics.h: gemm_sm90.cu is more than traps
            cxx.append("-DQKERNELS_SM90A")
            nvcc.append("-DQKERNELS_SM90A")
        # What takes longest begins, so that no core waits for another's last file.
        sources = sorted(cuda_sources, key=lambda name: "gemm_sm80" not in name) + sources
        cxx += ["-DQKERNELS_CUDA", f'-DQKERNELS_CUDA_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"']
        options["include_dirs"].append(str(home / "include"))
        options["library_dirs"] += [str(home / "lib64"), str(home / "lib")]  # the second: of packages
        options["libraries"] += ["cudart_static", "rt", "dl", "pthread"]
    # CppExtension even with CUDA: CUDAExtension asks for the CUDA libraries of torch, which a CPU-only torch lacks.
    module = cpp_extension.CppExtension(
        "qkernels._C",
        sources,
        py_limited_api=True,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        **options,
    )
    return module, cpp_extension.BuildExtension.with_options(use_ninja=True)


if os.environ.get("QKERNELS_NO_EXTENSION") == "1":
    setup()
else:
    module, build_ext = extension()
    setup(
        ext_modules=[module],
        cmdclass={"build_ext": build_ext},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
