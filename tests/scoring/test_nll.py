import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from maskft.scoring.nll import token_nll
from maskft.scoring.temperature import INVERSE_TEMPERATURES


def test_batches_and_padding_change_nothing() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).train()
    rows = [{"input_ids": list(range(1, n + 1)), "labels": [-100] * 2 + list(range(3, n + 1))} for n in (7, 3, 9, 4, 5)]
    with torch.no_grad():
        rows[1]["labels"][2] = int(model.eval()(input_ids=torch.tensor([rows[1]["input_ids"]])).logits[0, 1].argmax())
    result = token_nll(model.train(), Dataset.from_list(rows), batch_size=2, at_temperatures=True)
    assert model.training
    model.eval()
    for i, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        expected = F.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum")
        np.testing.assert_allclose(result.sums[i], expected.item(), rtol=1e-5)
        assert result.num_tokens[i] == len(row["input_ids"]) - 2
        assert result.right[i] == (i == 1)
        for number, sums in zip(INVERSE_TEMPERATURES, result.sums_at, strict=True):
            expected = F.cross_entropy(number * logits, torch.tensor(row["labels"][1:]), reduction="sum")
            np.testing.assert_allclose(sums[i], expected.item(), rtol=1e-5)
    cut = rows[1] | {"labels": [-100] * 3}  # nothing of it is scored, so nothing of it is right
    with_cut = token_nll(model, Dataset.from_list([*rows, cut]))
    assert with_cut.right.tolist() == [*result.right.tolist(), False]
    assert with_cut.num_tokens[-1] == with_cut.sums[-1] == 0
    np.testing.assert_allclose(result.mean, result.sums.sum() / result.num_tokens.sum())
    temperature, sums = result.at_best_temperature()
    assert sums.sum() == min(at.sum() for at in result.sums_at)
    assert round(1 / temperature, 3) in INVERSE_TEMPERATURES
    with pytest.raises(ValueError, match="at_temperatures=True"):
        token_nll(model, Dataset.from_list(rows)).at_best_temperature()
