"""What a result was measured with: versions and machine."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("maskft", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def versions(*others: str) -> dict[str, str]:
    """Versions of Python, of the packages that decide a result, and of `others`; one that is missing is left out."""
    result = {"python": platform.python_version()}
    for name in (*_PACKAGES, *others):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            continue
    return result


def machine() -> str:
    """Architecture, threads and accelerator that a result was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {device}"
