"""What this machine can do: the rate of matrix products per dtype, and the bandwidth of a copy, both measured.

    python -m benchmarks.limits [--device cuda]

From these follows a case's floor: the time of its products and copies at PyTorch's rates. It is a yardstick rather than
a bound, since PyTorch's products aren't the fastest on every processor.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass

import torch

from benchmarks.timing import best_time

# float16 is not among what processors multiply fast; torch would take minutes.
_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # of square matrices; the best counts
_COPIED = {"cpu": 2**27, "cuda": 2**31}  # bytes, several times what any cache holds
_SECONDS = {"cpu": 0.4, "cuda": 0.1}  # of timing each


@dataclass(frozen=True)
class Limits:
    """flops: operations per second of a matrix product, per dtype; "tf32" too on NVIDIA GPUs. bandwidth: bytes read and
    written per second by a copy. threads: of the processor that were used."""

    flops: dict[str, float]
    bandwidth: float
    device: str
    threads: int

    def floor(self, flops: float, n_bytes: float, dtype: str) -> float:
        """Seconds of so many operations in matrix products of `dtype` or of so many bytes moved, whichever are more."""
        return max(flops / self.flops[dtype], n_bytes / self.bandwidth)


def measure_limits(device: str = "cpu") -> Limits:
    """Takes a few seconds, with as many threads as torch is set to."""
    # Without AVX-512 torch takes minutes for bfloat16 as well; such a processor is no faster at it than at float32.
    wide = device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if wide:
        flops = dict.fromkeys(_DTYPES[device], _product_rate(torch.float32, device))
    else:
        flops = {name: _product_rate(getattr(torch, name), device) for name in _DTYPES[device]}
    if device == "cuda" and not torch.version.hip:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        flops["tf32"] = _product_rate(torch.float32, device)
        torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.zeros(_COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * _COPIED[device] / best_time(lambda: target.copy_(source), device, _SECONDS[device])
    return Limits(flops, bandwidth, device, torch.get_num_threads())


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _product_rate(dtype: torch.dtype, device: str) -> float:
    rates = []
    for size in _SIZES[device]:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        product = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
        rates.append(2 * size**3 / best_time(product, device, _SECONDS[device]))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, value in asdict(measure_limits(parser.parse_args().device)).items():
        print(f"{name:<10}  {value}")


if __name__ == "__main__":
    main()
