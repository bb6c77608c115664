"""What `maskft eval` can be told."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from maskft.errors import MaskftError, require_flags
from maskft.evaluation.tasks import TaskSettings
from maskft.values import check_value

_HINTS: dict[str, Any] = {
    **dict.fromkeys(("batch_size", "num_samples"), Annotated[int, Field(ge=1)]),
    "max_new_tokens": Annotated[int, Field(ge=1)] | None,
    "num_fewshot": Annotated[int, Field(ge=0)] | None,
    "temperature": Annotated[float, Field(ge=0, allow_inf_nan=False)],
    "dtype": Literal["auto", "float32", "bfloat16", "float16"],
}


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class EvalArguments:
    """Models, tasks, and the protocol that both are scored under."""

    output_dir: str | None = _flag(None, "Folder for samples and results.json.")
    models: str | None = _flag(None, "Folders or hub names, comma-separated; BASE+ADAPTER is the adapter on that base.")
    tasks: str | None = _flag(
        None, "lm-eval's tasks, groups or YAML files, nll:FILE, reasoning_gym:NAME; comma-separated."
    )
    include_path: str | None = _flag(None, "Folder with more of lm-eval's YAML tasks.")
    data_dir: str | None = _flag(None, "Folder of local task data. Default: the tasks' data sets on the hub.")
    limit: float | None = _flag(None, "The first items of each task, or a share of them below 1. Default: all.")
    num_fewshot: int | None = _flag(None, "Worked examples. Default: the task's own number.")
    apply_chat_template: bool = _flag(False, "Render prompts with the chat template.")
    fewshot_as_multiturn: bool = _flag(True, "Worked examples are turns of the chat, not one text.")
    system_instruction: str | None = _flag(None, "System message of every prompt.")
    gen_kwargs: str | None = _flag(None, "Settings of generation, as max_gen_toks=64,do_sample=True,temperature=0.7.")
    max_new_tokens: int | None = _flag(None, "Longest answer. Default: the task's own.")
    batch_size: int = _flag(16, "Items scored at once.")
    num_samples: int = _flag(1, "Answers drawn for each item; needs --temperature.")
    temperature: float = _flag(0.0, "0 answers greedily.")
    dtype: str = _flag("auto", "Dtype of the weights: auto (the checkpoint's), float32, bfloat16, float16.")
    seed: int | None = _flag(None, "Chooses worked examples and sampled answers. Default: lm-eval's seeds.")
    allow_code_execution: bool = _flag(False, "Let code tasks run what the model writes, in a sandbox.")
    force: bool = _flag(False, "Put an adapter on a base whose fingerprint differs.")
    rescore: bool = _flag(False, "Only compute results.json again from the samples in --output_dir.")

    def __post_init__(self) -> None:
        require_flags(self, "output_dir", *(() if self.rescore else ("models", "tasks")))
        for name, hint in _HINTS.items():
            check_value(name, getattr(self, name), hint)
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 2 and self.limit % 1 == 0)):
            raise MaskftError(f"`limit` must be at least 2 items or a share between 0 and 1, got {self.limit:g}.")
        if self.num_samples > 1 and not self.generation.get("do_sample"):
            alike = "but without --temperature all answers to an item are the same."
            raise MaskftError(f"`num_samples` is {self.num_samples}, {alike}")
        for name in ("data_dir", "include_path"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise MaskftError(f"--{name} is no folder here: {folder}; docs/how-to/eval.md says what it holds.")

    @property
    def generation(self) -> dict[str, Any]:
        """lm-eval's settings of generation, to go over those of the tasks."""
        given: dict[str, Any] = {}
        if self.temperature:  # Transformers would draw from the likeliest 50 tokens alone
            given = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        if self.max_new_tokens is not None:
            given["max_gen_toks"] = self.max_new_tokens
        if self.gen_kwargs:
            from lm_eval.utils import simple_parse_args_string

            given |= simple_parse_args_string(self.gen_kwargs)
        return given

    @property
    def task_settings(self) -> TaskSettings:
        """The part that decides what the tasks hold."""
        same = {f.name: getattr(self, f.name) for f in fields(TaskSettings) if f.name != "gen_kwargs"}
        return TaskSettings(**same, gen_kwargs=self.generation)
