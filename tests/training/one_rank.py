"""The command line as one rank of a test: FSDP2 on CPUs, which accelerate gives to accelerators alone, and a fault.

torchrun --nproc_per_node 2 tests/training/one_rank.py --fsdp --freeze 1 3 train --model_name_or_path ...
"""

import argparse
import os
import signal
import sys
import time
from typing import Any

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def use_fsdp() -> None:
    """What accelerate does where it finds several GPUs and a configuration of FSDP2."""
    os.environ |= FSDP
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    plain = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def before_step(step: int, act: Any) -> None:
    """Call `act` before the step of that number (from 0) begins."""
    from maskft.training.trainer import GuardedTrainer

    plain = GuardedTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            act()
        return plain(self, *args, **kwargs)

    GuardedTrainer.training_step = training_step


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fsdp", action="store_true")
    for fault in ("freeze", "kill", "sleep"):
        parser.add_argument(f"--{fault}", nargs=2, type=int, metavar=("RANK", "STEP"))
    given, arguments = parser.parse_known_args()
    if given.fsdp:
        use_fsdp()
    acts = {
        "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "sleep": lambda: time.sleep(1e6),
    }
    for fault, act in acts.items():
        rank, step = getattr(given, fault) or (-1, -1)
        if rank == int(os.environ.get("RANK", "0")):
            before_step(step, act)
    from maskft.cli import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
