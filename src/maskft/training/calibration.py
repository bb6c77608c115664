"""Learning at a model's own temperature, so that a mask gains nothing by making the model less sure of itself."""

from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer

from maskft.errors import MaskftError
from maskft.scoring.nll import token_nll

_NUM_ROWS = 512


def best_temperature(trainer: Trainer, rows: Dataset) -> float:
    """The temperature that suits the trainer's model, as it is now, best on up to 512 rows spread over `rows`.

    Args:
        rows: tokenised, with `input_ids` and `labels`.
    """
    spread = rows.select(range(0, len(rows), -(-len(rows) // _NUM_ROWS)))
    with trainer.compute_loss_context_manager():
        scored = token_nll(trainer.model, spread, batch_size=trainer.args.eval_batch_size, at_temperatures=True)
    return scored.at_best_temperature()[0]


def require_divisible(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose head adds a bias, or bends logits to a cap: dividing what enters it divides no logits."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    head = model.get_output_embeddings()
    if cap or getattr(head, "bias", None) is not None:
        what = f"caps its logits at {cap}" if cap else "adds a bias to its logits"
        raise MaskftError(f"`temperature_scaling` divides what enters the head, and {name!r} {what}; leave it out.")


def divide_logits(model: PeftModel, temperature: float) -> None:
    """Divide the logits of `model` by `temperature` in training mode; evaluations stay as they are.

    What leaves the last layer is divided, since losses that take the vocabulary in chunks do not call the head. The
    base model is left with the division when its adapter is unloaded.
    """

    def divide(module: nn.Module, inputs: Any, output: Any) -> Any:
        if module.training:
            output.last_hidden_state = output.last_hidden_state / temperature
        return output

    model.get_base_model().base_model.register_forward_hook(divide)
