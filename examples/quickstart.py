"""Learn a mask over a fine-tuned model, see whether it helped on rows it has not seen, and fold it in.

    python examples/quickstart.py MODEL [OUTPUT_DIR]

MODEL is the folder or hub name of a model that was fine-tuned on the rows; here they are made-up sums.
"""

import sys

import torch
from datasets import Dataset
from sums import sums
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from maskft import MaskCallback, MaskConfig, find_group

name, output_dir = sys.argv[1], (sys.argv[2:] or ["quickstart"])[0]
has_gpu = torch.cuda.is_available()
tokenizer = AutoTokenizer.from_pretrained(name)

trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
    # A score moves by about the learning rate a step: 2e-5 would flip next to nothing.
    args=SFTConfig(output_dir, learning_rate=1e-3, max_steps=30, bf16=has_gpu, use_cpu=not has_gpu, report_to=[]),
    train_dataset=Dataset.from_list(sums(240)),
    eval_dataset=Dataset.from_list(sums(80, seed=1)),
    processing_class=tokenizer,
    peft_config=MaskConfig(selection="threshold", init_scores="uniform", task_type="CAUSAL_LM"),
    callbacks=[MaskCallback()],
)
trainer.train()
with_mask = trainer.evaluate()["eval_loss"]
with trainer.model.disable_adapter():
    without = trainer.evaluate()["eval_loss"]
kept = find_group(trainer.model, "default").kept_share()
print(
    f"Kept {kept:.2%} of the masked weights. Loss on new rows: {without:.4f} without the mask, {with_mask:.4f} with it."
)

trainer.save_model(f"{output_dir}/mask")  # one bit a weight
plain = trainer.model.merge_and_unload()  # a plain model: neither maskft nor PEFT is needed to load it
plain.save_pretrained(f"{output_dir}/merged")
tokenizer.save_pretrained(f"{output_dir}/merged")
