"""DeepSpeed's ZeRO on gloo processes: the masks of one process, with a LoRA control; where DeepSpeed is installed."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import NUM_STEPS, batches, build, check_file, loss_of, mean, train
from torch import multiprocessing

from maskft.errors import MaskftError
from maskft.masks import num_flipped_bits
from maskft.tuner import find_group

pytest.importorskip("deepspeed", reason="DeepSpeed is no dependency; it installs without a GPU by DS_BUILD_OPS=0")


def initialise(model: Any, stage: int, rank: int, num_processes: int, folder: str, threshold: int = 0) -> Any:
    """DeepSpeed's engine around a model, in the process that this is."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_processes
    )
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which is compiled for minutes, and gloo does too
    config = {
        "train_micro_batch_size_per_gpu": 6 // num_processes,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": threshold},
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def work(rank: int, num_processes: int, folder: str, kind: str, stage: int, threshold: int) -> None:
    model = build(kind, torch.float32)
    engine = initialise(model, stage, rank, num_processes, folder, threshold)
    losses = []
    for ids in batches(rank, num_processes):
        loss = loss_of(engine, ids)
        engine.backward(loss)
        engine.step()
        losses.append(mean(loss.detach(), num_processes))
    found: dict[str, Any] = {"losses": losses}
    if kind != "lora":
        group = find_group(model, "default")
        if stage == 3:
            with pytest.raises(MaskftError, match="Under ZeRO-3 masks are chosen by all"):
                model.save_pretrained(folder)
        found |= {"masks": dict(group.masks()), "flips": group.take_flips(), "reachable": group.reachable_share(1e-3)}
        found["refreshes"] = group.num_refreshes
        layer = next(iter(group.layers.values()))
        found["sizes"] = [layer.maskft_scores["default"].numel(), layer.get_base_layer().weight.numel()]
        found["copies"] = len(layer._masked_weights)
        group.config.save_scores = True
        if stage == 3:
            with pytest.raises(MaskftError, match="save the adapter, and merge it in one process"):
                model.merge_adapter()
        # Saving gathers: every process calls it.
        model.save_pretrained(f"{folder}/adapter{rank}")
        found["is_loaded"] = engine.save_checkpoint(folder) and comes_back(engine, group, folder)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def comes_back(engine: Any, group: Any, folder: str) -> bool:
    """Whether masks that have moved on come back from DeepSpeed's checkpoint."""
    before = dict(group.masks())
    for ids in batches(0, 1):
        engine.backward(loss_of(engine, ids))
        engine.step()
    has_moved = any(not torch.equal(mask, before[name]) for name, mask in group.masks().items())
    engine.load_checkpoint(folder, load_module_strict=False)
    group.refresh(anew=True)
    return has_moved and all(torch.equal(mask, before[name]) for name, mask in group.masks().items())


def in_processes(num_processes: int, folder: Path, *arguments: object) -> list[dict[str, Any]]:
    multiprocessing.spawn(work, (num_processes, str(folder), *arguments), nprocs=num_processes)
    return [torch.load(folder / f"{rank}.pt") for rank in range(num_processes)]


# Under the threshold parameters stay whole on all processes: biases and norms, in a real model.
@pytest.mark.parametrize(
    ("kind", "stage", "num_processes", "threshold"),
    [
        ("topk", 1, 2, 0),
        ("topk", 2, 2, 0),
        ("topk", 3, 2, 0),
        ("topk", 3, 2, 1000),
        ("global_topk", 3, 3, 0),
        ("threshold", 3, 3, 0),
    ],
)
def test_masks_are_those_of_one_process(
    kind: str, stage: int, num_processes: int, threshold: int, tmp_path: Path
) -> None:
    alone = build(kind, torch.float32)
    losses = train(alone, 0, 1)
    group = find_group(alone, "default")
    masks, flips, reachable = dict(group.masks()), group.take_flips(), group.reachable_share(1e-3)
    num_bits = sum(8 * mask.numel() for mask in masks.values())
    assert flips > 0
    for rank, found in enumerate(in_processes(num_processes, tmp_path, kind, stage, threshold)):
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        # Sums of gradients are rounded in another order.
        assert sum(num_flipped_bits(found["masks"][name], mask) for name, mask in masks.items()) <= 0.001 * num_bits
        assert found["flips"] == pytest.approx(flips, rel=0.01)
        assert found["reachable"] == pytest.approx(reachable, rel=0.01)
        assert found["refreshes"] == 2 + NUM_STEPS, "at the start, once split or moved, after each step"
        if stage == 3 and not threshold:
            assert found["sizes"] == [0, 0], "scores and weights are split"
        assert found["copies"] == (0 if stage == 3 else 1), "no masked copy of split weights is kept"
        # The files hold every process's part, and what is in memory.
        check_file(tmp_path / f"adapter{rank}", found["masks"], group, rtol=1e-4, atol=1e-5)
        assert found["is_loaded"]


@pytest.mark.parametrize("stage", [2, 3])
def test_lora_is_trained_in_the_same_way(stage: int, tmp_path: Path) -> None:
    losses = train(build("lora", torch.float32), 0, 1)
    for found in in_processes(2, tmp_path, "lora", stage, 0):
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
