"""Where the annex computes, and whether in bfloat16."""

from pathlib import Path
from typing import Any

import torch

from maskft.adapters.model_files import load_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def has_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 itself; a CPU that has to emulate it took six times as long as float32."""
    can = torch.cpu.get_capabilities()
    return DEVICE == "cuda" or bool(can.get("amx_bf16") or can.get("avx512_bf16"))


def load_on_device(folder: Path | str) -> Any:
    """A model in float32, in evaluation mode."""
    return load_model(str(folder), "float32").to(DEVICE).eval()
