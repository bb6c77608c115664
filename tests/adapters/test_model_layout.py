from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel

from maskft.adapters.model_layout import read_layout


def test_layout_knows_transposed_layers(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=12, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    layout = read_layout(tmp_path)
    found = {
        name: (layer.out_features, layer.in_features, layer.fan_in_fan_out)
        for name in ("transformer.h.0.attn.c_attn", "h.0.attn.c_proj", "lm_head", "transformer.h.1.attn.c_proj")
        if (layer := layout.find(name))
    }
    assert list(found.values()) == [(36, 12, True), (12, 12, True), (16, 12, False)]
