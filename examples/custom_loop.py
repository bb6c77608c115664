"""Learn a mask in a training loop of one's own, save it, and load it again.

    python examples/custom_loop.py MODEL [OUTPUT_DIR]

MODEL is the folder or hub name of a fine-tuned model; the rows are made-up sums.
"""

import sys

import torch
from peft import PeftModel, get_peft_model
from sums import sums
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig, find_group

name, output_dir = sys.argv[1], (sys.argv[2:] or ["custom_loop"])[0]
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)


model = get_peft_model(base(), MaskConfig(selection="threshold", init_scores="uniform", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
masks = find_group(model, "default")
texts = [row["prompt"] + row["completion"] for row in sums(160)]
for start in range(0, len(texts), 8):
    batch = tokenizer(texts[start : start + 8], return_tensors="pt", padding=True).to(device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    loss.backward()
    optimizer.step()  # the masks are chosen anew right after it
    optimizer.zero_grad()
    print(f"loss {loss.item():.4f}  flips {masks.take_flips()}  kept {masks.kept_share():.2%}")

model.save_pretrained(output_dir)  # one bit a weight
again = PeftModel.from_pretrained(base(), output_dir)
with torch.no_grad():
    ids = batch["input_ids"]
    print("The saved mask gives the same logits:", torch.equal(model(ids).logits, again(ids).logits))
