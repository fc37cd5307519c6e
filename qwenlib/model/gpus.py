"""Data sheets of GPUs: what a plan divides by."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One accelerator: bytes of memory, dense bf16 FLOP/s (fp32 sums), bytes/s of its memory."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    source: str


# "80 GB" counts as 80e9 bytes; the device reports some percent more, which is left to the driver,
# communication buffers and fragmentation. Tensor FLOP/s given "with sparsity" are halved.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 40e9, 312e12, 1.555e12, "NVIDIA A100 data sheet, SXM"),
        Gpu("a100-80gb", 80e9, 312e12, 2.039e12, "NVIDIA A100 data sheet, SXM"),
        Gpu("h100-sxm", 80e9, 989.4e12, 3.35e12, "NVIDIA H100 data sheet: 1,979 sparse"),
        Gpu("h100-pcie", 80e9, 756e12, 2.0e12, "NVIDIA H100 data sheet: 1,513 sparse"),
        Gpu("h200", 141e9, 989.4e12, 4.8e12, "NVIDIA H200 data sheet: 1,979 sparse"),
        Gpu("b200", 180e9, 2.25e15, 7.7e12, "NVIDIA Blackwell data sheet, HGX: 4,500 sparse"),
        Gpu("l40s", 48e9, 362.05e12, 864e9, "NVIDIA L40S data sheet"),
        Gpu("rtx-4090", 24e9, 165.2e12, 1.008e12, "NVIDIA Ada architecture white paper"),
    )
}

# What the driver calls them, as patterns that leave out siblings of another speed.
_NAMES = {
    r"A100-(SXM4|PCIE)-40GB$": "a100-40gb",
    r"A100-SXM4-80GB$|A100 80GB PCIe$": "a100-80gb",
    r"H100 80GB HBM3$|H100 SXM": "h100-sxm",
    r"H100 PCIe$": "h100-pcie",
    r"\bH200$": "h200",
    r"\bB200$": "b200",
    r"L40S$": "l40s",
    r"RTX 4090$": "rtx-4090",
}


def gpu_of(device_name: str) -> Gpu | None:
    """The sheet of a device by the name that its driver gives; None for one that is not here."""
    for pattern, key in _NAMES.items():
        if re.search(pattern, device_name):
            return GPUS[key]
    return None
