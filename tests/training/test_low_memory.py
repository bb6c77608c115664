"""Scores stepped in the backward: the same mask as a step after it, and nothing of a score's size kept beside it."""

import pytest
import torch
from peft import get_peft_model
from runs import mask
from same import assert_same_files, log_of, logged
from transformers import AutoModelForCausalLM

from maskft import find_group, step_in_backward
from maskft.tuner import MaskLayer

pytestmark = pytest.mark.usefixtures("undrawn_reports")


@pytest.mark.parametrize("selection", ["topk", "global_topk"])
@pytest.mark.parametrize(
    ("optim", "checkpointing"), [("adafactor", False), ("adafactor", True), ("adamw_torch_fused", False)]
)
def test_it_gives_the_mask_of_a_step_after_the_backward(train, tmp_path, selection, optim, checkpointing) -> None:
    changes = {"optim": optim, "max_grad_norm": 0, "num_train_epochs": 1, "gradient_checkpointing": checkpointing}
    usual = train(tmp_path / "usual", mask(selection=selection), **changes)
    low = train(tmp_path / "low", mask(selection=selection), low_memory=True, **changes)
    entries = log_of(usual["log_history"])
    assert [{k: v for k, v in entry.items() if k != "grad_norm"} for entry in entries] == log_of(low["log_history"])
    assert sum(logged(low, "flips")) > 0
    assert_same_files(*(tmp_path / name / "adapter_model.safetensors" for name in ("usual", "low")))


def test_neither_gradients_nor_masked_weights_are_kept(tiny_model) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), mask())
    group = find_group(model, "default")
    group.keeps_masked_weights = False
    scores = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in scores]
    alive = []
    optimizer = torch.optim.Adafactor(scores, lr=1e-2)
    for parameter in scores:
        parameter.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in scores)))
    step_in_backward(optimizer)
    chosen = group.num_refreshes
    ids = torch.arange(3, 30).view(1, -1)
    model(input_ids=ids, labels=ids).loss.backward()
    assert alive == [1] * len(scores), "one gradient at a time"
    assert all(p.grad is None for p in scores)
    assert all(not torch.equal(a, b) for a, b in zip(scores, before, strict=True))
    assert group.num_refreshes == chosen, "no mask changes while the backward is under way"
    optimizer.step()
    assert group.num_refreshes == chosen + 1
    assert not any(layer._masked_weights for layer in model.modules() if isinstance(layer, MaskLayer))
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    assert state < 0.2 * sum(p.numel() for p in scores), "rows and columns"
