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
    folders = [tmp_path / str(seed) for seed in range(3)]
    weights = []
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
        weights.append({name: weight.detach().clone() for name, weight in model.state_dict().items()})
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
    reports = [report_of(folder) for folder in [*folders, tmp_path / "average"]]
    assert [each["seed"] for each in reports[2]["averaged"]] == [0, 1]
    assert [each["best"] for each in reports[2]["averaged"]] == [each["best"] for each in reports[:2]]
    card = (tmp_path / "average" / "README.md").read_text()
    assert "of 2 fine-tunings, which are averaged: eval_loss" in card
    for report in reports[:2]:
        assert f"{report['best']['value']:.4f}" in card
