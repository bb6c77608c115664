"""An adapter belongs to one model: nothing is lost or mixed, and what is refused or exported leaves nothing behind."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from tiny import Quantized, X, layers_of, llama, load, logits, plain_weights, refused, same, step
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from maskft import MaskConfig, find_group
from maskft.adapters.read import read_adapter


@pytest.mark.filterwarnings("ignore:You are trying to modify a model")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("default", {}),
        ("default", {"density": 0.5}),
        ("default", {"selection": "global_topk"}),
        ("default", {"layers_to_transform": [0]}),
        ("other", {}),
    ],
)
def test_a_second_mask_on_a_base_that_has_one_is_refused(name: str, settings: dict[str, object]) -> None:
    base = llama()
    first = get_peft_model(base, MaskConfig(layers_to_transform=[1], density=0.7))
    step(first)
    expected, masks = logits(first), dict(find_group(first, "default").masks())
    with refused(r"has a mask already \('default'\).*call unload\(\)"):
        get_peft_model(base, MaskConfig(**settings), adapter_name=name)
    assert torch.equal(logits(first), expected)
    assert same(find_group(first, "default").masks(), masks)
    plain = first.unload()
    assert plain_weights(plain) == plain_weights(llama())
    second = get_peft_model(plain, MaskConfig(**settings), adapter_name=name)
    assert len(plain._forward_pre_hooks) == 1, "what the first left behind"
    step(second)
    with refused(rf"has a mask named '{name}' already; call delete_adapter\(\) first"):
        second.base_model.inject_adapter(plain, name)


@pytest.fixture
def folders(tmp_path):
    """An adapter for the base of seed 0, one for another layer of it, and one for another base."""
    for name, seed, layer in (("right", 0, 0), ("other layer", 0, 1), ("foreign", 9, 0)):
        config = MaskConfig(density=0.7, layers_to_transform=[layer])
        get_peft_model(llama(seed), config).save_pretrained(tmp_path / name)
    return tmp_path


def test_a_refused_load_leaves_a_model_in_use_as_it_was(folders) -> None:
    base = llama()
    model = load(folders / "right", base)
    expected = logits(model)
    with refused("has a mask already"):
        load(folders / "other layer", base)
    with refused("not the one this mask"):
        model.load_adapter(folders / "foreign", "x")
    assert torch.equal(logits(model), expected)
    model.load_adapter(folders / "other layer", "x")
    assert torch.equal(logits(model), expected)
    model.set_adapter("x")
    assert not torch.equal(logits(model), expected)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of what it traces
@pytest.mark.parametrize("how", ["export", "trace"])
@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_an_exported_model_computes_the_same_and_nothing_is_left_behind(
    folders, how: str, is_warm: bool, learns: bool
) -> None:
    base = llama(num_layers=2)
    config = MaskConfig(density=0.7, layers_to_transform=[0])
    get_peft_model(llama(num_layers=2), config).save_pretrained(folders / "two")
    model = get_peft_model(base, config) if learns else load(folders / "two", base)
    expected = logits(copy.deepcopy(model))
    if is_warm:
        logits(model)
    with torch.no_grad():
        if how == "export":
            exported = torch.export.export(Logits(model.eval()), (X,)).module()
        else:
            exported = torch.jit.trace(Logits(model.eval()), (X,), check_trace=False)
        torch.testing.assert_close(exported(X), expected)
    assert torch.equal(logits(model), expected)
    if learns:
        step(model)
        assert not torch.equal(logits(model), expected)


def test_an_adapter_of_a_compiled_base_has_the_names_of_the_plain_one(tmp_path) -> None:
    compiled, plain = torch.compile(llama(), backend="eager"), llama()
    plain.model.layers[1] = torch.compile(plain.model.layers[1], backend="eager")
    models = [get_peft_model(base, MaskConfig(density=0.7)) for base in (llama(), compiled, plain)]
    files = []
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
        files.append(load_file(tmp_path / str(i) / "adapter_model.safetensors"))
    for file in files[1:]:
        assert same(file, files[0])
    loaded = load(tmp_path / "0", torch.compile(llama(), backend="eager"))
    assert torch.equal(
        find_group(loaded, "default").masks()["model.layers.1.mlp.up_proj"],
        files[0]["base_model.model.model.layers.1.mlp.up_proj.maskft_mask"],
    )


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_a_head_that_is_in_no_file_is_refused_and_one_that_is_goes_on_working(tmp_path, task) -> None:
    llama().save_pretrained(tmp_path / "base")
    read = AutoModelForSequenceClassification.from_pretrained
    model = read(tmp_path / "base", num_labels=2)
    with refused(r"`score\.weight` is not in .*base, so it was made at random"):
        get_peft_model(model, MaskConfig(task_type=task))
    model.save_pretrained(tmp_path / "with head")
    model = get_peft_model(read(tmp_path / "with head"), MaskConfig(density=0.7, task_type=task))
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"maskft_scores"}
    model.save_pretrained(tmp_path / "mask")
    expected = logits(model)
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "mask")
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", read(tmp_path / "with head"))), expected)


@pytest.mark.filterwarnings("ignore:(Already found a `peft_config`|You are trying to modify a model):UserWarning")
@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize(
    "add",
    [
        get_peft_model,
        lambda model, config: inject_adapter_in_model(config, model),
        lambda model, config: model.add_adapter(config, "other"),
    ],
)
def test_another_method_over_a_mask_is_refused_before_it_trains(tmp_path, is_loaded: bool, add) -> None:
    llama().save_pretrained(tmp_path / "base")
    peft_model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), MaskConfig(density=0.7))
    peft_model.save_pretrained(tmp_path / "mask")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mask") if is_loaded else peft_model.base_model.model
    expected, lora = logits(model), LoraConfig(target_modules=["q_proj"])
    get_peft_model(llama(), lora).save_pretrained(tmp_path / "lora")
    for act in (lambda: add(model, lora), lambda: load(tmp_path / "lora", model)):
        with refused("has a mask, and a LoraConfig laid over it would lose the mask once it is merged; merge the mask"):
            act()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(get_peft_model(peft_model.merge_and_unload(), lora)), expected)
    if is_loaded:
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(load(tmp_path / "again")), expected)


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("call", [logits, step, lambda m: m.merge_adapter(), lambda m: m.merge_and_unload()])
def test_weights_that_are_quantized_are_refused_under_a_mask_and_before_one(call, is_warm: bool) -> None:
    model = get_peft_model(llama(), MaskConfig(density=0.7))
    if is_warm:
        logits(model)
    for layer in layers_of(model).values():  # as torchao does
        values = layer.base_layer.weight.detach().clone().as_subclass(Quantized)
        layer.base_layer.weight = nn.Parameter(values, requires_grad=False)
    with refused(r"was quantized \(Quantized\); merge the mask first"):
        call(model)
    with refused(r"its weight is quantized \(Quantized, torch.float32\); load the model without"):
        get_peft_model(model.unload(), MaskConfig(target_modules=["up_proj"]))


def test_settings_of_a_newer_version_are_told_of_and_left_out(folders) -> None:
    file = folders / "right" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"newer": 1}))
    loaded = llama()
    for read in (lambda at: load(at), lambda at: loaded.load_adapter(str(at)), read_adapter):
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['newer'\]"):
            read(folders / "right")


def test_what_a_mask_has_no_meaning_for_is_refused_in_a_sentence() -> None:
    with refused("`low_cpu_mem_usage` makes none; leave it out"):
        get_peft_model(llama(), MaskConfig(), low_cpu_mem_usage=True)
    with refused("cannot be summed with weights; activate several"):
        get_peft_model(llama(), MaskConfig()).add_weighted_adapter(["default"], [1.0], "sum")
