"""The ranking of layers under a reference: by what a mask of the change can change."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft.data.rows import load_rows
from maskft.tuner import MaskConfig, check_targets
from maskft_lab.landscape.run import loss_terms
from maskft_lab.search.saliency import layer_saliency


def test_the_layer_that_alone_was_fine_tuned_comes_first(tiny_model: Path, sums: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model = copy.deepcopy(before)
    names = check_targets(MaskConfig(), model)
    torch.manual_seed(0)
    changes = {name: 1e-3 * torch.randn_like(model.get_parameter(f"{name}.weight")) for name in names if ".2." in name}
    for name, change in changes.items():
        model.get_parameter(f"{name}.weight").data += change
    terms, _ = loss_terms(model, AutoTokenizer.from_pretrained(tiny_model), load_rows(str(sums)), 64, 64)
    of_weights = layer_saliency(model, names, terms)
    assert max(of_weights, key=lambda layer: of_weights[layer]) != 2
    found = layer_saliency(model, names, terms, before)
    terms[0]({}).backward()
    gradients = {name: model.get_parameter(f"{name}.weight").grad for name in changes}
    wanted = sum(float((gradients[name] * change).abs().sum()) for name, change in changes.items())
    assert found == pytest.approx({0: 0.0, 1: 0.0, 2: wanted}, rel=1e-3)
