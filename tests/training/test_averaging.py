"""Averages of fine-tuned models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from maskft.training.averaging import average_models


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_the_mean_of_those_of_the_models(tie_word_embeddings, dtype, tmp_path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tie_word_embeddings)
    folders, weights = [tmp_path / str(seed) for seed in range(3)], []
    for folder in folders:
        model = LlamaForCausalLM(config).to(dtype)
        weights.append(model.state_dict())
        model.save_pretrained(folder)
    averaged = average_models(folders)
    assert averaged.dtype == dtype
    for name, weight in averaged.state_dict().items():
        mean = torch.stack([each[name].double() for each in weights]).mean(0)
        torch.testing.assert_close(weight, mean.to(dtype))
    averaged.save_pretrained(tmp_path / "average")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in averaged.state_dict().items())
