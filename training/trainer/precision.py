"""Where bf16 is fast: a processor without its instructions emulates it, some thirty times slower than fp32."""

from __future__ import annotations

import torch


def has_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products are faster than fp32 (3x on AVX-512 BF16), not merely emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
