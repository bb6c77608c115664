from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel

from maskft.adapters.model_layout import LinearLayout, read_layout


def test_layout_knows_transposed_layers(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=12, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    layout = read_layout(tmp_path)
    assert layout.find("transformer.h.0.attn.c_attn") == LinearLayout(36, 12, True)
    assert layout.find("h.0.attn.c_proj") == LinearLayout(12, 12, True)
    assert layout.find("lm_head") == LinearLayout(16, 12, False)
    assert layout.find("transformer.h.1.attn.c_proj") is None
