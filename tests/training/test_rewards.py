"""Masks learned from preferences and rewards with TRL's own trainers; what these take as the reference."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from runs import OF_TRL, logits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from maskft import MaskCallback, MaskConfig, MaskftError, find_group

PAIRS = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a + 2)} for a in range(16)]
GENERATED = {"max_completion_length": 6, "num_generations": 4, "beta": 0.1, "temperature": 1.0}
KINDS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "grpo": (GRPOTrainer, GRPOConfig, GENERATED),
    "rloo": (RLOOTrainer, RLOOConfig, GENERATED),
}
MAX_FLIPS = 0.002


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def digits(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def scores_of(callback: MaskCallback) -> list[Tensor]:
    return [layer.maskft_scores["default"].detach().clone() for layer in callback.group.layers.values()]


def constant(completions: list[str], **_: Any) -> list[float]:
    return [1.0 for _ in completions]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path):
    """Train for some steps from a model that differs from the one before fine-tuning; the trainer and its callback."""
    torch.manual_seed(0)
    pretrained = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in pretrained.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pretrained.save_pretrained(tmp_path / "pretrained")

    def train(kind: str, reward: Any = digits, learning_rate: float = 1e-3, **settings: Any):
        trainer, arguments, more = KINDS[kind]
        shown = {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        steps = {"learning_rate": learning_rate, "max_steps": 4, "per_device_train_batch_size": 4, "seed": 1}
        args = arguments(output_dir=str(tmp_path / "run"), bf16=False, use_cpu=True, **shown, **steps, **more)
        settings = {"reference_model_name_or_path": str(tmp_path / "pretrained"), "max_flips": MAX_FLIPS} | settings
        callback = MaskCallback()
        made = trainer(
            AutoModelForCausalLM.from_pretrained(tiny_model),
            args=args,
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
            peft_config=MaskConfig.preset("preferences", task_type="CAUSAL_LM", **settings),
            callbacks=[callback],
            **({} if kind == "dpo" else {"reward_funcs": reward}),
        )
        return made, callback

    return train


@pytest.mark.parametrize("kind", KINDS)
def test_only_scores_move_and_no_more_weights_flip_at_a_step_than_allowed(run, tiny_model, kind) -> None:
    trainer, callback = run(kind)
    plain, group = AutoModelForCausalLM.from_pretrained(tiny_model), callback.group
    assert group.kept_share() == 1
    before = scores_of(callback)
    flips: list[int] = []
    choose = group.after_step
    group.after_step = lambda stepped: (choose(stepped), flips.append(group.take_flips()))
    trainer.train()
    assert 0 < callback.reachable_share < 1
    most = MAX_FLIPS * group.num_weights() + 1
    assert 0 < max(flips) <= most
    assert sum(flips) > most, "the limit is one of a step"
    weights = {
        name.replace(".base_layer", ""): tensor for name, tensor in trainer.model.base_model.model.state_dict().items()
    }
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items())
    assert not any(map(torch.equal, before, scores_of(callback)))
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(plain))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    if kind == "dpo":
        assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-4), "policy and reference are the same at first"
    else:
        assert logs[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert abs(logs[-1]["kl"]) > 1e-6


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_constant_reward_moves_nothing(run, kind) -> None:
    trainer, callback = run(kind, constant)
    before = scores_of(callback)
    trainer.train()
    assert all(map(torch.equal, before, scores_of(callback)))
    assert callback.group.kept_share() == 1


def test_without_the_limit_a_step_flips_as_many_as_the_learning_rate_reaches(run) -> None:
    trainer, callback = run("grpo", max_flips=1.0)
    trainer.train()
    assert callback.group.kept_share() < 1 - 8 * MAX_FLIPS
    with pytest.raises(MaskftError, match=r"`max_flips` must be in \(0, 1\]"):
        run("grpo", selection="topk", init_scores="normal")


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


def test_the_reference_is_the_unmasked_model(tiny_model, tmp_path) -> None:
    # Starts with nothing left out; a threshold well within reach of three steps.
    mask = MaskConfig(selection="threshold", init_scores="keep_all", init_std=1e-3, task_type="CAUSAL_LM")
    run = trainer(tiny_model, tmp_path, load(tiny_model), peft_config=mask)
    run.train()
    first, *_, last = losses(run)
    assert last != first
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
