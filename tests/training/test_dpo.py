"""Masks learned from preferences with TRL's own trainer: the reference is the model as the masks reference it."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from runs import OF_TRL, logits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from maskft import MaskConfig, find_group

PAIRS = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a + 2)} for a in range(16)]


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def trainer(folder: Path, output_dir: Path, model: PreTrainedModel | PeftModel, **options) -> DPOTrainer:
    steps = {"per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "save_strategy": "no"}
    options |= {"args": DPOConfig(output_dir=str(output_dir), **OF_TRL, **steps)}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return DPOTrainer(model, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer, **options)


def losses(run: DPOTrainer) -> list[float]:
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(0.6931, abs=1e-4), "policy and reference are the same at first"
    return logged


def disturbed(folder: Path) -> PeftModel:
    """A masked model whose scores have moved, as by training."""
    model = get_peft_model(load(folder), MaskConfig(task_type="CAUSAL_LM"))
    with torch.no_grad():
        for layer in find_group(model, "default").layers.values():
            layer.maskft_scores["default"] += 0.02 * torch.randn_like(layer.maskft_scores["default"])
    return model


def reference_log_probs(trained: DPOTrainer) -> tuple[dict[str, Tensor], Tensor]:
    """A batch, and what the trainer takes as the reference's log-probabilities of its answers."""
    batch = next(iter(trained.get_train_dataloader()))
    return batch, torch.cat(trained.compute_ref_log_probs(trained.model.eval(), batch))


def log_probs(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        scores = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens, is_answer = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    return (scores.log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2) * is_answer).sum(1)


def test_preferences_move_masks_alone_and_the_reference_is_the_unmasked_model(tiny_model, tmp_path) -> None:
    before = {name: tensor.clone() for name, tensor in load(tiny_model).state_dict().items()}
    # Starts with nothing left out; a threshold well within reach of three steps.
    mask = MaskConfig(selection="threshold", init_scores="keep_all", init_std=1e-3, task_type="CAUSAL_LM")
    run = trainer(tiny_model, tmp_path, load(tiny_model), peft_config=mask)
    group = find_group(run.model, "default")
    assert group.kept_share() == 1
    run.train()

    assert run.state.global_step == 3
    assert group.take_flips() > 0
    assert group.kept_share() < 1
    first, *_, last = losses(run)
    assert last != first
    for name, layer in group.layers.items():
        assert torch.equal(layer.get_base_layer().weight, before[f"{name}.weight"])
    with run.model.disable_adapter():
        assert torch.equal(logits(run.model), logits(load(tiny_model)))
    assert not torch.equal(logits(run.model), logits(load(tiny_model)))
    batch, reference = reference_log_probs(run)
    torch.testing.assert_close(reference, log_probs(load(tiny_model), batch))
    assert not torch.allclose(reference, log_probs(run.model, batch), atol=1e-3)

    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(load(tiny_model), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(run.model))


def test_a_mask_trained_further_has_its_own_start_as_the_reference(tiny_model, tmp_path) -> None:
    model = disturbed(tiny_model)
    model.peft_config["default"].save_scores = True
    model.save_pretrained(tmp_path / "start")
    start = PeftModel.from_pretrained(load(tiny_model), tmp_path / "start")

    further = PeftModel.from_pretrained(load(tiny_model), tmp_path / "start", is_trainable=True)
    run = trainer(tiny_model, tmp_path, further)
    assert torch.equal(logits(run.model), logits(start))
    run.train()
    assert not torch.equal(logits(run.model), logits(start))
    batch, reference = reference_log_probs(run)
    torch.testing.assert_close(reference, log_probs(start, batch))


def test_a_mask_trained_in_the_same_session_is_the_reference_too(tiny_model, tmp_path) -> None:
    model = disturbed(tiny_model)
    start = logits(model)
    run = trainer(tiny_model, tmp_path, model)
    run.model.set_adapter("ref")
    assert torch.equal(logits(run.model), start)
    run.model.set_adapter("default")
    assert torch.equal(logits(run.model), start)
    run.train()
    losses(run)
    assert not torch.equal(logits(run.model), start)
    run.model.set_adapter("ref")
    assert torch.equal(logits(run.model), start)


def test_another_adapter_of_the_same_configuration_starts_anew(tiny_model) -> None:
    config = MaskConfig(task_type="CAUSAL_LM")
    start = logits(get_peft_model(load(tiny_model), config))
    model = disturbed(tiny_model)
    assert not torch.equal(logits(model), start)
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert torch.equal(logits(model), start)
