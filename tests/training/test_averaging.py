"""Averages of fine-tuned models."""

import pytest
import torch
from same import report_of
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from maskft.training.averaging import average_models, save_average


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


def test_the_report_of_an_average_tells_of_each_fine_tuning(sft, tmp_path, undrawn_reports) -> None:
    folders = [tmp_path / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        sft(folder, seed=seed, num_train_epochs=1)
    save_average(folders, tmp_path / "average")
    bests = [report_of(folder)["best"] for folder in folders]
    averaged = report_of(tmp_path / "average")["averaged"]
    assert averaged == [{"seed": seed, "best": best} for seed, best in enumerate(bests)]
    card = (tmp_path / "average" / "README.md").read_text()
    assert "of 2 fine-tunings, which are averaged: eval_loss" in card
    assert all(f"{best['value']:.4f}" in card for best in bests)
