"""Fine-tune a model on one task, and give back what it forgot of everything else.

    python examples/restore.py BASE GENERAL_ROWS [OUTPUT_DIR]

BASE is the folder or hub name of a model. GENERAL_ROWS is a file of rows that the model shall go on answering as
before, in any form of training rows; the task is made-up sums. Each step is also a command: `maskft sft`, `maskft
restore`, `maskft merge`.
"""

import json
import sys
from pathlib import Path

from sums import sums

from maskft.commands import merge, restore, sft

base, general, output_dir = sys.argv[1], sys.argv[2], Path((sys.argv[3:] or ["restore"])[0])
output_dir.mkdir(parents=True, exist_ok=True)
task = output_dir / "task.jsonl"
task.write_text("".join(json.dumps(row) + "\n" for row in sums(200)), encoding="utf-8")


def flags(**settings: object) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


tuned, restored = output_dir / "tuned", output_dir / "restored"
sft(flags(model_name_or_path=base, dataset_name=task, output_dir=tuned, learning_rate=1e-3, max_steps=30))
restore(
    flags(
        model_name_or_path=tuned,
        reference_model_name_or_path=base,
        dataset_name=task,
        retain_dataset_name=general,
        output_dir=restored,
    )
)
print(json.loads((restored / "report.json").read_text())["restore"]["sentence"])
merge(flags(adapter_name_or_path=restored, output_dir=output_dir / "merged"))
