# SPDX-License-Identifier: Apache-2.0
"""What this installation can do, and what to do about what it cannot.

Run as ``python -m slope_ext.env_report``.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from slope_ext import _library
from slope_ext._version import __version__

MIN_CUSPARSELT = (0, 8, 0)


def report() -> str:
    """The report as text: versions, build, GPUs, which ops have kernels, and advice."""
    info = build_info()
    lines = [
        f"slope_ext        {__version__}",
        f"python           {platform.python_version()} ({sys.executable})",
        f"torch            {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"built against    torch {info['torch_headers']}, for torch >= {info['torch_target']}",
        f"compiler         {info['compiler']}, nvcc {info['cuda'] or 'none'}",
        f"compiled for     {_archs(info) or 'CPU only'}",
        f"cuSPARSELt       {_cusparselt()}",
    ]
    lines += [f"GPU {i}            {_gpu(i)}" for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        lines.append("GPU              none")
    for name in _library.OPS:
        lines.append(f"{'op ' + name:<24} {_implementation(name)}")
    for package in ("transformers", "tokenizers", "safetensors", "datasets", "tensorboard"):
        lines.append(f"{package:<16} {_version(package)}")
    lines += ["", *(_advice(info) or ["Everything that this version offers is available."])]
    return "\n".join(lines)


def build_info() -> dict[str, str]:
    """Build facts of the native libraries; see ``slope_ext._C.build_info``."""
    from slope_ext import _C

    return dict(_C.build_info())


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for one GPU each."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _archs(info: dict[str, str]) -> str:
    return ", ".join(f"sm_{arch}" for arch in info["cuda_archs"].split(",") if arch)


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
    )


def _implementation(name: str) -> str:
    if name in _library.COMPOSED:
        return "composed of CUDA kernels; reference on the CPU"
    if name in _library.CUDA_KERNELS and not _library.FORCE_REFERENCE:
        return "CUDA kernel; reference on the CPU"
    return "reference"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cusparselt() -> str:
    """Version of the cuSPARSELt that torch has mapped, or of an installed wheel."""
    library = _find_cusparselt()
    if library is None:
        return "not found"
    version = []
    for part in range(3):  # libraryPropertyType: major, minor, patch
        value = ctypes.c_int()
        library.cusparseLtGetProperty(part, ctypes.byref(value))
        version.append(value.value)
    text = ".".join(map(str, version))
    wanted = ".".join(map(str, MIN_CUSPARSELT))
    return text if tuple(version) >= MIN_CUSPARSELT else f"{text} (too old, >= {wanted} needed)"


def _find_cusparselt() -> ctypes.CDLL | None:
    soname = "libcusparseLt.so.0"
    paths = [soname]
    for package in ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12"):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        paths += [str(Path(str(f.locate()))) for f in files if f.name == soname]
    for path in paths:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def _advice(info: dict[str, str]) -> list[str]:
    """One line for each thing that is missing: what, and what to do."""
    advice = []
    if not info["cuda"]:
        advice.append(
            "No CUDA kernels in this build: install the CUDA toolkit, then `make clean build`."
        )
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            advice.append("This torch has no CUDA: install a CUDA build of torch to use a GPU.")
        else:
            advice.append("torch sees no GPU: check the driver with nvidia-smi.")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        arch = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
        covered = _library.covers(major, minor)
        if info["cuda"] and (not covered or (arch == "90a" and "90a" not in info["cuda_archs"])):
            advice.append(
                f"GPU {index} is sm_{major}{minor}, "
                + (
                    "for which this build lacks the own product"
                    if covered
                    else "which this build does not cover"
                )
                + f": rebuild with SLOPE_CUDA_ARCHS={arch}-real."
            )
    fast = {*_library.CUDA_KERNELS, *_library.COMPOSED}
    missing = [name for name in _library.OPS if name not in fast]
    if torch.cuda.is_available() and missing:
        advice.append(f"On the GPU these ops run references (slow): {', '.join(missing)}.")
    if _library.FORCE_REFERENCE:
        advice.append("SLOPE_EXT_FORCE_REFERENCE is set: unset it to use the CUDA kernels.")
    if _version("transformers") == "not installed":
        advice.append("slope-pretrain needs more packages: pip install 'slope-ext[pretrain]'.")
    return advice


if __name__ == "__main__":
    print(report())
