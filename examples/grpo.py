"""Learn from a reward which changes of a fine-tuning to take back.

    python examples/grpo.py FINE_TUNED BASE [OUTPUT_DIR]

FINE_TUNED and BASE are folders or hub names of a model after and before its fine-tuning; the reward is for digits.
"""

import sys

import torch
from datasets import Dataset
from sums import digits, sums
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from maskft import MaskCallback, MaskConfig, find_group

name, base, output_dir = sys.argv[1], sys.argv[2], (sys.argv[3:] or ["grpo"])[0]
has_gpu = torch.cuda.is_available()

trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
    reward_funcs=digits,
    args=GRPOConfig(
        output_dir,
        learning_rate=1e-4,
        max_steps=10,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=8,
        bf16=has_gpu,
        use_cpu=not has_gpu,
        report_to=[],
    ),
    train_dataset=Dataset.from_list(sums(40)),
    processing_class=AutoTokenizer.from_pretrained(name, padding_side="left"),
    # Equal rewards give no gradient: then no score moves, and the mask keeps everything.
    peft_config=MaskConfig.preset("preferences", reference_model_name_or_path=base, task_type="CAUSAL_LM"),
    callbacks=[MaskCallback()],
)
trainer.train()
taken_back = 1 - find_group(trainer.model, "default").kept_share()
print(f"{taken_back:.3%} of the changes are taken back.")
trainer.save_model(f"{output_dir}/mask")
