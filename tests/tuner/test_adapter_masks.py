"""When an adapter's masks are chosen, from which scores, and how many of them a step can reach."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from peft import get_peft_model
from tiny import X, chosen, llama, logits, masked, refused, step

from maskft import MaskConfig, find_group
from maskft.masks import num_kept


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_masks_are_chosen_once_a_step_whatever_the_optimizer(options) -> None:
    model = masked()
    group = find_group(model, "default")
    optimizer = step(model, **options)
    assert group.num_refreshes == 2  # at the start, and after the step
    for _ in range(3):
        model(input_ids=X, labels=X).loss.backward()
    assert group.num_refreshes == 2
    optimizer.step()
    assert group.num_refreshes == 3
    assert group.take_flips() > 0
    assert all(torch.equal(layer.mask(["default"]), chosen(layer)) for layer in group.layers.values())


def test_a_global_ranking_is_over_all_masked_tensors() -> None:
    group = find_group(masked(density=0.7, selection="global_topk"), "default")
    group.refresh()
    layers = list(group.layers.values())
    scores = torch.cat([layer.maskft_scores["default"].detach().abs().flatten() for layer in layers])
    kept = torch.cat([layer.mask(["default"]).flatten() for layer in layers])
    assert kept.sum() == num_kept(kept.numel(), 0.7)
    assert scores[kept].min() >= scores[~kept].max()
    shares = {round(layer.mask(["default"]).float().mean().item(), 3) for layer in layers}
    assert len(shares) > 1, "the share of a single tensor is free"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_activations_choose_no_mask_again(use_reentrant) -> None:
    plain, checkpointed = masked(), masked()
    checkpointed.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model.train()
        step(model)
    assert find_group(checkpointed, "default").num_refreshes == 2
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_nan_scores_are_refused_at_the_step_that_made_them() -> None:
    model = masked()
    optimizer = step(model)
    scores = next(p for p in model.parameters() if p.requires_grad)
    scores.grad = torch.full_like(scores, float("nan"))
    with refused("mask scores are NaN"):
        optimizer.step()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("init", ["magnitude", "normal"])
def test_a_base_that_holds_no_number_is_named_and_not_the_learning_rate(value, init) -> None:
    base = llama()
    base.model.layers[0].mlp.up_proj.weight.data[1, 2] = value
    told = refused(r"The weight of `model\.layers\.0\.mlp\.up_proj` holds NaN .*download it again")
    if init == "magnitude":
        with told:
            get_peft_model(base, MaskConfig(init_scores=init))
        return
    model = get_peft_model(base, MaskConfig(init_scores=init))
    scores = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").maskft_scores["default"]
    scores.grad = torch.full_like(scores, value) * 0  # as the product with the weight makes it
    with told:
        torch.optim.AdamW([scores]).step()


def test_a_copy_learns_on_its_own() -> None:
    model = masked()
    logits(model)
    twin = copy.deepcopy(model)
    step(twin, fused=True)
    assert find_group(model, "default").num_refreshes == 1
    assert find_group(twin, "default").take_flips() > 0


def test_the_reachable_share_bounds_the_flips() -> None:
    model = masked()
    group = find_group(model, "default")
    assert group.reachable_share(0.0) < 0.01
    assert group.reachable_share(10.0) == 1.0
    share = group.reachable_share(1e-3)
    step(model, learning_rate=1e-3, weight_decay=0.0)
    assert 0 < group.take_flips() <= share * group.num_weights()


@pytest.mark.parametrize("selection", ["topk", "global_topk", "threshold"])
def test_the_reachable_share_is_that_of_the_scores_near_the_border(selection) -> None:
    group = find_group(masked(density=0.8, selection=selection), "default")
    transform = torch.abs if selection != "threshold" else torch.clone
    scores = [transform(layer.maskft_scores["default"].detach()).flatten() for layer in group.layers.values()]
    total = sum(len(s) for s in scores)
    pools = [torch.cat(scores)] if selection == "global_topk" else scores
    expected = 0
    for pool in pools:
        if selection == "threshold":
            border, reach = group.config.threshold, 0.003
        else:
            # A rank's border can move towards the score by as much as the score towards it.
            border, reach = pool.sort(descending=True).values[num_kept(len(pool), 0.8) - 1].item(), 0.006
        expected += sum(abs(value - border) <= reach for value in pool.tolist())
    assert group.reachable_share(0.003) == pytest.approx(expected / total, abs=2 / total)


def test_a_cap_on_flips_is_refused_where_scores_are_copies(monkeypatch) -> None:
    model = masked(selection="threshold", init_scores="uniform", max_flips=0.1)
    monkeypatch.setattr("maskft.tuner.adapter_masks.zero.steps_copies", lambda: True)
    with refused("`max_flips` moves scores after a step; FSDP2 and DeepSpeed split them: leave"):
        step(model)


def test_bit_mask_tuning_deletes_few_weights_of_the_gate_alone() -> None:
    model = get_peft_model(llama(intermediate_size=1800), MaskConfig.preset("bmt", task_type="CAUSAL_LM"))
    group = find_group(model, "default")
    assert {name.rpartition(".")[2] for name in group.layers} == {"gate_proj"}
    assert group.num_weights() == 3 * 20 * 1800
    optimizer, num_out = None, []
    for _ in range(6):
        optimizer = step(model, optimizer, learning_rate=0.015)
        num_out.append(sum(int((~layer.mask(["default"])).sum()) for layer in group.layers.values()))
    assert num_out[0] == 0  # the first step ends above the border
    assert num_out[-1] > num_out[1] > 0
    assert max(after - before for before, after in pairwise(num_out)) <= 2  # 1e-5 of 108,000, rounded up
    assert find_group(get_peft_model(llama(), MaskConfig.preset("bmt")), "default").config.reference == "zero"
