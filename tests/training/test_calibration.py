"""Scores that learn at the model's own temperature, beside the cross entropy of divided logits."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from runs import data, settings
from same import logged
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

from maskft import MaskConfig, MaskftError, find_group
from maskft.data.rows import load_rows, tokenise_rows
from maskft.data.tokens import RowTokeniser
from maskft.scoring.nll import token_nll
from maskft.training.calibration import best_temperature, divide_logits
from maskft.training.run import run_train
from maskft.training.trainer import MaskTrainer, build_trainer

SIZES = {"vocab_size": 98, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "eos_token_id": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def trainer(tiny_model: Path, sums: Path, tmp_path: Path) -> MaskTrainer:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = get_peft_model(model, MaskConfig(density=0.5, task_type="CAUSAL_LM"))
    rows = load_rows(str(sums))
    return build_trainer(model, AutoTokenizer.from_pretrained(tiny_model), rows, rows, settings(tmp_path))


def test_the_loss_and_its_gradient_are_those_of_divided_logits(trainer: MaskTrainer) -> None:
    model = trainer.model
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    scores = [layer.maskft_scores["default"] for layer in find_group(model, "default").layers.values()]

    def plain(temperature: float) -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[0, :-1]
        return F.cross_entropy(logits / temperature, ids[0, 1:])

    model.train()
    expected = plain(2.5)
    gradients = torch.autograd.grad(expected, scores)
    at_one = plain(1.0).detach()
    divide_logits(model, 2.5)
    loss = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, expected)
    assert abs((loss - at_one).item()) > 1e-3
    for gradient, wanted in zip(torch.autograd.grad(loss, scores), gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), at_one)
        torch.testing.assert_close(plain(1.0), at_one)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0)), "caps its logits at 30.0"),
        (PhiForCausalLM(PhiConfig(**SIZES)), "adds a bias to its logits"),
    ],
)
def test_logits_that_are_not_divided_so_are_refused_before_anything_learns(
    model, told, tiny_model, sums, tmp_path
) -> None:
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    given = settings(tmp_path / "run", temperature_scaling=True)
    with pytest.raises(MaskftError, match=told):
        run_train(data(tmp_path / "model", sums), given, MaskConfig(task_type="CAUSAL_LM"))


def test_the_temperature_is_that_of_the_rows(trainer: MaskTrainer, tiny_model: Path, sums: Path) -> None:
    rows = tokenise_rows(load_rows(str(sums)), RowTokeniser(AutoTokenizer.from_pretrained(tiny_model)))
    expected, _ = token_nll(trainer.model, rows, at_temperatures=True).at_best_temperature()
    assert best_temperature(trainer, rows) == expected != 1
    many = Dataset.from_list([*rows] * (1 + 512 // len(rows)))
    assert len(many) > 512
    assert best_temperature(trainer, many) == pytest.approx(expected, rel=0.1)


def test_a_run_says_at_which_temperature_it_learned(train, tmp_path) -> None:
    config = MaskConfig(density=0.5, layers_to_transform=[1], task_type="CAUSAL_LM")
    plain = train(tmp_path / "plain", config)
    scaled = train(tmp_path / "scaled", config, temperature_scaling=True)
    assert plain["mask"]["temperature"] == 1 != scaled["mask"]["temperature"]
    assert logged(plain, "train_loss") != logged(scaled, "train_loss")
