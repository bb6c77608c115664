"""The command line as one rank of a test: FSDP2 on CPUs, which accelerate gives to accelerators alone, and a fault."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState
from runs import before_step

from maskft.cli import main

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true"}
FSDP |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


def use_fsdp() -> None:
    """Do what accelerate does where it finds several GPUs and a configuration of FSDP2."""
    os.environ |= FSDP
    plain = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def use_zero(stage: int) -> None:
    """Set what `accelerate launch` sets from a configuration of DeepSpeed."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    os.environ |= {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}
    # An extension for CPUs would be compiled for minutes; gloo does the same.
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def work(environment: dict[str, str], errors: Path, given: Sequence[str]) -> None:
    """Run a command of maskft as a rank, in a process of its own.

    Not in conftest.py, a name that several folders share and pickle takes for one.
    """
    from server import begin  # beside tests/conftest.py, so for copies of the tests' server alone

    begin(environment, None, errors)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--zero", type=int, metavar="STAGE")
    parser.add_argument("--folders", nargs=2, help="Where ranks 0 and 1 work, as on hosts whose disks differ.")
    parser.add_argument("--kill", nargs=2, type=int, default=(-1, -1), metavar=("RANK", "STEP"))
    parsed, arguments = parser.parse_known_args(given)
    if parsed.fsdp:
        use_fsdp()
    if parsed.zero:
        use_zero(parsed.zero)
    if parsed.folders:
        os.chdir(parsed.folders[int(os.environ["RANK"])])
    rank, step = parsed.kill
    if rank == int(os.environ["RANK"]):
        before_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    sys.exit(main(arguments))
