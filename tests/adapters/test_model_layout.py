from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from maskft.adapters.model_layout import LinearLayout, read_layout
from maskft.errors import MaskftError


def test_layout_knows_transposed_layers(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=12, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    layout = read_layout(tmp_path)
    assert layout.find("transformer.h.0.attn.c_attn") == LinearLayout(36, 12, True)
    assert layout.find("h.0.attn.c_proj") == LinearLayout(12, 12, True)
    assert layout.find("lm_head") == LinearLayout(16, 12, False)
    assert layout.find("transformer.h.1.attn.c_proj") is None


def test_layout_of_what_is_no_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(MaskftError, match="a model of the type 'vit', which Transformers cannot read as a causal"):
        read_layout(tmp_path)
