"""A mask of every kind of model that can be tiny: loaded, merged, saved, and merged by file.

    python fuzz/architectures.py --output_file studies/reliability/architectures.json [KIND ...]

What is compared is every tensor, bit for bit, with `W * mask` where the mask is unpacked from the adapter's file by
NumPy alone. A kind is "exact", or has the first thing that was not; what cannot be made tiny is listed with the reason.
"""

import argparse
import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from maskft import MaskConfig
from maskft.adapters.merge import merge_checkpoint
from maskft.errors import MaskftError, first_line

_AUTO = {
    "": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    " (seq2seq)": (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    " (images)": (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
KINDS = {f"{model_type}{suffix}": (auto, model_type) for suffix, (auto, types) in _AUTO.items() for model_type in types}
IDS = torch.arange(2, 20).view(2, 9)
MAX_PARAMETERS = 30_000_000

_SIZES = {
    16: "hidden_size d_model n_embd embed_dim attention_hidden_size",
    24: "intermediate_size d_ff ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim moe_intermediate_size "
    "shared_expert_intermediate_size",
    2: "num_hidden_layers num_layers n_layer encoder_layers decoder_layers num_decoder_layers num_attention_heads "
    "num_key_value_heads num_heads n_head encoder_attention_heads decoder_attention_heads num_experts_per_tok "
    "eos_token_id",
    4: "num_experts num_local_experts n_routed_experts qk_nope_head_dim qk_rope_head_dim rotary_dim state_size",
    8: "head_dim d_kv v_head_dim q_lora_rank kv_lora_rank hidden_size_per_layer_input",
    32: "max_position_embeddings n_positions n_ctx",
    64: "vocab_size vocab_size_per_layer_input",
    1: "bos_token_id",
    0: "pad_token_id decoder_start_token_id num_kv_shared_layers",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
# What one kind alone needs.
SPECIAL: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4},
    **{kind: {"head_dim": 4} for kind in ("deepseek_v3", "youtu", "axk1")},
}


def tiny_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Small values for those settings of a configuration whose names are known."""
    settings = {name: SIZES[name] for name, value in config.to_dict().items() if name in SIZES and _is_size(value)}
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_type" in rope and config.model_type.startswith("qwen2_"):
        settings["rope_parameters"] = rope | {"mrope_section": [2, 1, 1]}  # half a head
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            settings[name] = {"model_type": part.model_type} | tiny_settings(part)
    return settings


def _is_size(value: Any) -> bool:
    return value is None or type(value) is int


def make(kind: str) -> PreTrainedModel:
    """A tiny random model of a kind."""
    auto, model_type = KINDS[kind]
    settings = tiny_settings(AutoConfig.for_model(model_type)) | SPECIAL.get(model_type, {})
    config = AutoConfig.for_model(model_type, **settings)
    with torch.device("meta"):
        size = auto.from_config(config).num_parameters()
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config)
    return model


def logits(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS, use_cache=False, **more).logits
    return result


def by_hand(base: PreTrainedModel, adapter: Path) -> dict[str, Tensor]:
    """The weights of `base`, those of masked modules multiplied by what the bits in the file say."""
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for key, packed in load_file(adapter / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.").removesuffix(".maskft_mask")
        weight = weights[f"{name}.weight"]
        oriented = weight.T if isinstance(base.get_submodule(name), Conv1D) else weight
        bits = np.unpackbits(packed.numpy(), axis=1, count=oriented.shape[1], bitorder="little").astype(bool)
        oriented[torch.from_numpy(~bits)] = 0
    return weights


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are in one alone, or whose bytes differ."""
    return [
        name
        for name in sorted(found.keys() | expected.keys())
        if name not in found or name not in expected or not _same_bytes(found[name], expected[name])
    ]


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    both = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second)]
    return first.shape == second.shape and torch.equal(*both)


def check(kind: str, folder: Path) -> dict[str, str]:
    """What became of each part of a mask's way: "exact", or what was not.

    Raises:
        MaskftError: no mask of this kind of model can be made.
    """
    base, adapter, saved, merged = (folder / name for name in ("base", "adapter", "saved", "merged"))
    model = make(kind)
    read = type(model).from_pretrained
    model.save_pretrained(base)
    masked = get_peft_model(read(base), MaskConfig(density=0.7))
    masked.save_pretrained(adapter)
    expected = by_hand(read(base), adapter)
    loaded = PeftModel.from_pretrained(read(base), adapter)
    result = {"load": "exact" if torch.equal(logits(loaded), logits(masked)) else "other logits"}
    before = logits(loaded)
    plain = loaded.merge_and_unload()
    result["merge"] = _told(differing(plain.state_dict(), expected))
    if not torch.equal(logits(plain), before):
        result["merge"] = "other logits"
    plain.save_pretrained(saved)
    result["save"] = _told(differing(read(saved).state_dict(), expected))
    try:
        merge_checkpoint(adapter, merged)
    except MaskftError as error:
        return result | {"file_merge": str(error).replace(f"{folder}/", "")}
    files = [load_file(where / "model.safetensors") for where in (merged, saved)]
    of_files, of_model = differing(*files), differing(read(merged).state_dict(), expected)
    return result | {"file_merge": _told([*of_model, *(f"in the file: {name}" for name in of_files)])}


def _told(names: list[str]) -> str:
    return f"{len(names)} tensors differ, the first is {names[0]}" if names else "exact"


def _result(kind: str, folder: Path) -> dict[str, str]:
    try:
        model = make(kind)
        logits(model)
        model.save_pretrained(folder / "made")
        others = differing(type(model).from_pretrained(folder / "made").state_dict(), model.state_dict())
    except Exception as error:  # of Transformers, for sizes that do not fit together
        return {"not_made": f"{type(error).__name__}: {first_line(error)}"}
    if others:
        return {"not_made": f"Transformers reads other values than it saved: {_told(others)}"}
    try:
        return check(kind, folder)
    except MaskftError as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="KIND")
    parser.add_argument("--output_file", type=Path)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as folder:
            results[kind] = _result(kind, Path(folder))
        if set(results[kind].values()) != {"exact"}:
            print(kind, results[kind], flush=True)
    counts = Counter(next((part for part, told in r.items() if told != "exact"), "exact") for r in results.values())
    print(f"{len(results)} kinds: {dict(counts)}")
    if given.output_file:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        given.output_file.write_text(json.dumps({"versions": versions, "kinds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
