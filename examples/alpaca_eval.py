r"""A model's answers to AlpacaEval's instructions, in the form that the `alpaca_eval` command reads.

    python examples/alpaca_eval.py --model MODEL [--adapter ADAPTER] --instructions alpaca_eval.json \
        --output_file answers.json
    pip install alpaca-eval && alpaca_eval --model_outputs answers.json

`alpaca_eval.json` is a list of {"instruction": ...}, as in the data set tatsu-lab/alpaca_eval. The command asks a paid
judge (OPENAI_API_KEY) which of two answers is better.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import maskft  # noqa: F401 -- registers the method with PEFT
from maskft.evaluation.generation import generate_answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or hub name of a model with a chat template.")
    parser.add_argument("--adapter", help="Folder of an adapter on that model.")
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--max_new_tokens", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=16)
    given = parser.parse_args()
    instructions = [row["instruction"] for row in json.loads(given.instructions.read_text(encoding="utf-8"))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(given.model).to(device)
    if given.adapter:
        model = PeftModel.from_pretrained(model, given.adapter)
    prompts = [[{"role": "user", "content": instruction}] for instruction in instructions]
    answers, _ = generate_answers(
        model,
        AutoTokenizer.from_pretrained(given.model),
        prompts,
        max_new_tokens=given.max_new_tokens,
        batch_size=given.batch_size,
    )
    generator = Path(given.adapter or given.model).name
    rows = [
        {"instruction": instruction, "output": answer, "generator": generator}
        for instruction, answer in zip(instructions, answers, strict=True)
    ]
    given.output_file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
