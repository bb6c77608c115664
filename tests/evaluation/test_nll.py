import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from maskft.evaluation.nll import token_nll


def test_batches_and_padding_change_nothing() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).train()
    rows = [{"input_ids": list(range(1, n + 1)), "labels": [-100] * 2 + list(range(3, n + 1))} for n in (7, 3, 9, 4, 5)]
    result = token_nll(model, Dataset.from_list(rows), batch_size=2)
    assert model.training
    model.eval()
    for i, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        expected = F.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum")
        np.testing.assert_allclose(result.sums[i], expected.item(), rtol=1e-5)
        assert result.num_tokens[i] == len(row["input_ids"]) - 2
    np.testing.assert_allclose(result.mean, result.sums.sum() / result.num_tokens.sum())
