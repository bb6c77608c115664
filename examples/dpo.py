"""Learn from pairs of answers which changes of a fine-tuning to take back.

    python examples/dpo.py FINE_TUNED BASE [OUTPUT_DIR]

FINE_TUNED and BASE are folders or hub names of a model after and before its fine-tuning; the pairs are made-up sums.
"""

import sys

import torch
from datasets import Dataset
from sums import pairs
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from maskft import MaskCallback, MaskConfig, find_group

name, base, output_dir = sys.argv[1], sys.argv[2], (sys.argv[3:] or ["dpo"])[0]
has_gpu = torch.cuda.is_available()

trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
    # 1e-4 over 20 steps keeps most weights out of reach, so that the policy stays near its reference.
    args=DPOConfig(output_dir, learning_rate=1e-4, max_steps=20, bf16=has_gpu, use_cpu=not has_gpu, report_to=[]),
    train_dataset=Dataset.from_list(pairs(160)),
    processing_class=AutoTokenizer.from_pretrained(name),
    # Everything is kept at the start, and at most a thousandth of the weights flips in a step.
    peft_config=MaskConfig.preset("preferences", reference_model_name_or_path=base, task_type="CAUSAL_LM"),
    callbacks=[MaskCallback()],
)
trainer.train()
taken_back = 1 - find_group(trainer.model, "default").kept_share()
print(f"{taken_back:.3%} of the changes are taken back.")
trainer.save_model(f"{output_dir}/mask")
