"""What `maskft eval` can be told."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from maskft.errors import MaskftError, require_flags

_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class EvalArguments:
    """Models, tasks, and the protocol that both are scored under."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder for samples and results.json."})
    models: str | None = field(
        default=None,
        metadata={"help": "Folders or hub names, comma-separated; BASE+ADAPTER is the adapter on that base."},
    )
    tasks: str | None = field(
        default=None,
        metadata={
            "help": "Tasks, comma-separated, as gsm8k,ifeval,nll:FILE,reasoning_gym:NAME; see docs/evaluation.md."
        },
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of local task data. Default: the tasks' data sets on the hub."}
    )
    limit: int | None = field(
        default=None, metadata={"help": "Items of each task, a random part that --seed chooses. Default: all."}
    )
    num_fewshot: int | None = field(default=None, metadata={"help": "Worked examples. Default: the task's own number."})
    apply_chat_template: bool = field(default=False, metadata={"help": "Render prompts with the chat template."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer. Default: the task's own."})
    batch_size: int = field(default=16, metadata={"help": "Items scored at once."})
    num_samples: int = field(default=1, metadata={"help": "Answers drawn for each item; needs --temperature."})
    temperature: float = field(default=0.0, metadata={"help": "0 answers greedily."})
    dtype: str = field(
        default="auto", metadata={"help": "Dtype of the weights: auto (the checkpoint's), float32, bfloat16, float16."}
    )
    seed: int = field(default=0, metadata={"help": "Chooses the items of --limit, worked examples, sampled answers."})
    allow_code_execution: bool = field(
        default=False, metadata={"help": "Let code tasks run what the model writes, in a sandbox."}
    )
    force: bool = field(default=False, metadata={"help": "Put an adapter on a base whose fingerprint differs."})
    rescore: bool = field(
        default=False, metadata={"help": "Only compute results.json again from the samples in --output_dir."}
    )

    def __post_init__(self) -> None:
        require_flags(self, "output_dir", *(() if self.rescore else ("models", "tasks")))
        for name in ("limit", "max_new_tokens", "batch_size", "num_samples"):
            value = getattr(self, name)
            least = 2 if name == "limit" else 1
            if value is not None and value < least:
                raise MaskftError(f"`{name}` must be at least {least}, got {value}.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise MaskftError(f"`num_fewshot` must be at least 0, got {self.num_fewshot}.")
        if not 0 <= self.temperature < math.inf:
            raise MaskftError(f"`temperature` must be a number of at least 0, got {self.temperature}.")
        if self.num_samples > 1 and self.temperature == 0:
            raise MaskftError(
                f"`num_samples` is {self.num_samples}, but without --temperature all answers to an item are the same."
            )
        if self.dtype not in _DTYPES:
            raise MaskftError(f"`dtype` must be one of {', '.join(_DTYPES)}, got {self.dtype!r}.")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise MaskftError(
                f"--data_dir is no folder here: {self.data_dir}; give one laid out as docs/evaluation.md says."
            )
