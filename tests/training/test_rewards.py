"""Masks learned from preferences and rewards with TRL's own trainers, under the preset for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import logits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from maskft import MaskCallback, MaskConfig, MaskftError

PAIRS = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a + 2)} for a in range(16)]
GENERATED = {"max_completion_length": 6, "num_generations": 4, "beta": 0.1, "temperature": 1.0}
KINDS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "grpo": (GRPOTrainer, GRPOConfig, GENERATED),
    "rloo": (RLOOTrainer, RLOOConfig, GENERATED),
}
MAX_FLIPS = 0.002


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
