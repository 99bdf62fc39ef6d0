"""Peak arithmetic of known accelerators, for model FLOPs utilisation."""

from __future__ import annotations

# Dense bf16 TFLOP/s with fp32 accumulation, from the vendors' data sheets (those quote twice as much "with sparsity").
# The first name found in the device's name counts, so variants come before the plain name they contain.
_PEAKS = (
    ("GB300", 2500.0),
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("B100", 1750.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.4),
    ("H800 PCIe", 756.5),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.4),
)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak in TFLOP/s of the device that torch calls `device_name`; None when it is not known.

    A slice of a device (MIG) has a share of the peak that its name does not tell: None as well.
    """
    words = device_name.replace("-", " ").replace("_", " ").split()
    if "MIG" in words:
        return None
    for name, peak in _PEAKS:
        wanted = name.split()
        # Whole words, so that L4 is not found in L40 nor A10 in A100; "H100 PCIe" may have the memory size between.
        if all(word in words for word in wanted):
            return peak
    return None
