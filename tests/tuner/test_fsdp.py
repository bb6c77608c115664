"""FSDP2 (`fully_shard`) and DDP on gloo processes: the masks of one process, bit for bit, with a LoRA control."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import NUM_STEPS, SETTINGS, build, check_file, train
from peft import PeftModel
from tiny import refused, same
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from maskft.tuner import find_group


def shard(model: Any) -> None:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)


@contextmanager
def joined(rank: int, num_processes: int, folder: str) -> Iterator[None]:
    """Within a group of processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_processes)
    yield
    distributed.destroy_process_group()


def work(rank: int, num_processes: int, folder: str, kind: str) -> None:
    with joined(rank, num_processes, folder):
        model = build(kind)
        shard(model)
        result: dict[str, Any] = {"losses": train(model, rank, num_processes)}
        if kind != "lora":
            group = find_group(model, "default")
            result |= {"masks": dict(group.masks()), "flips": group.take_flips(), "refreshes": group.num_refreshes}
            result["reachable"] = group.reachable_share(1e-3)
            group.config.save_scores = True
            with refused("save the adapter, and merge it in one process"):
                model.merge_adapter()
            # Saving gathers: every process calls it.
            model.save_pretrained(folder + f"/adapter{rank}")
        torch.save(result, f"{folder}/{rank}.pt")


def work_ddp(rank: int, num_processes: int, folder: str, kind: str) -> None:
    with joined(rank, num_processes, folder):
        model = build(kind)
        losses = train(DistributedDataParallel(model), rank, num_processes)
        torch.save({"losses": losses, "masks": dict(find_group(model, "default").masks())}, f"{folder}/{rank}.pt")


def in_processes(num_processes: int, folder: Path, kind: str, work: Any = work) -> list[dict[str, Any]]:
    start_processes(work, (num_processes, str(folder), kind), nprocs=num_processes, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(num_processes)]


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("kind", list(SETTINGS))
def test_masks_are_those_of_one_process(kind: str, num_processes: int, tmp_path: Path) -> None:
    alone = build(kind)
    losses = train(alone, 0, 1)
    group = find_group(alone, "default")
    masks, flips, reachable = dict(group.masks()), group.take_flips(), group.reachable_share(1e-3)
    assert flips > 0
    for result in in_processes(num_processes, tmp_path, kind):
        assert result["losses"] == pytest.approx(losses, rel=1e-9)
        assert same(result["masks"], masks)
        assert result["flips"] == flips
        assert result["reachable"] == pytest.approx(reachable)
        assert result["refreshes"] == 2 + NUM_STEPS, "at the start, once split, and after each step"
    # Every shard's bits and scores are in the file, and any number of processes goes on from it.
    check_file(tmp_path / "adapter0", masks, group, rtol=1e-5, atol=2e-6)
    loaded = PeftModel.from_pretrained(alone.unload(), tmp_path / "adapter0", is_trainable=True)
    assert same(find_group(loaded, "default").masks(), masks)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_masks_under_ddp_are_those_of_one_process(num_processes: int, tmp_path: Path) -> None:
    alone = build("topk")
    losses = train(alone, 0, 1)
    for result in in_processes(num_processes, tmp_path, "topk", work_ddp):
        assert result["losses"] == pytest.approx(losses, rel=1e-9)
        assert same(result["masks"], find_group(alone, "default").masks())


def work_fsdp1(rank: int, folder: str) -> None:
    with joined(rank, 2, folder):
        plain = build("topk", torch.float32)
        model = FullyShardedDataParallel(plain, use_orig_params=True, device_id=torch.device("cpu"))
        with refused(r"FSDP's first version flattens scores.*fsdp_version: 2"):
            train(model, rank, 2)
        Path(folder, f"refused{rank}").touch()


def test_the_first_fsdp_is_refused(tmp_path: Path) -> None:
    start_processes(work_fsdp1, (str(tmp_path),), nprocs=2, start_method="forkserver")
    assert len(list(tmp_path.glob("refused*"))) == 2


def test_lora_is_split_in_the_same_way(tmp_path: Path) -> None:
    losses = train(build("lora"), 0, 1)
    for result in in_processes(2, tmp_path, "lora"):
        assert result["losses"] == pytest.approx(losses, rel=1e-9)
