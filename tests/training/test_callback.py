"""Masks learned with trainers of Transformers' and TRL's own, and `maskft.MaskCallback` among their callbacks."""

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from runs import OF_TRL, every
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback
from trl import SFTConfig, SFTTrainer

from maskft import MaskCallback, MaskConfig, MaskftError, find_group


def trainer(model_folder: Path, rows: Path, output_dir: Path, *callbacks, **options) -> SFTTrainer:
    dataset = load_dataset("json", data_files=str(rows), split="train")
    args = SFTConfig(output_dir=str(output_dir), max_steps=6, **OF_TRL, **every(2), **options)
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(8)),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=MaskConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 2]),
        callbacks=list(callbacks),
    )


def scores(run: SFTTrainer) -> dict[str, torch.Tensor]:
    """Under the names that a checkpoint gives them."""
    layers = find_group(run.model, "default").layers
    return {f"base_model.model.{name}.maskft_scores": layer.maskft_scores["default"] for name, layer in layers.items()}


def test_a_trainer_goes_on_from_its_checkpoints_and_ends_with_the_best(tiny_model, sums, tmp_path) -> None:
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    run = trainer(tiny_model, sums, tmp_path / "run", EarlyStoppingCallback(3), MaskCallback(), **options)
    run.train()
    best = load_file(Path(run.state.best_model_checkpoint) / "adapter_model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in scores(run).items())

    again = trainer(tiny_model, sums, tmp_path / "run", MaskCallback())
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    last = load_file(tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, last[name]) for name, tensor in scores(again).items())

    # What is saved in the end has one bit a weight.
    again.save_model(str(tmp_path / "adapter"))
    assert all(key.endswith("maskft_mask") for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter")


def test_without_it_a_checkpoint_is_refused_with_a_word_of_it(tiny_model, sums, tmp_path) -> None:
    trainer(tiny_model, sums, tmp_path / "run").train()
    again = trainer(tiny_model, sums, tmp_path / "run")
    with pytest.raises(MaskftError, match=r"holds masks but no scores, .* a trainer with maskft\.MaskCallback\(\)"):
        again.train(resume_from_checkpoint=True)


def test_an_adapter_of_another_name_is_found(tiny_model) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), MaskConfig(), adapter_name="mine")
    callback = MaskCallback(adapter_name="mine")
    assert callback.state()["attributes"] == {"num_flips": 0}
    callback.on_init_end(None, None, None, model=model)
    assert callback.group is find_group(model, "mine")
    with pytest.raises(MaskftError, match="no mask adapter named 'default'"):
        MaskCallback().on_init_end(None, None, None, model=model)
