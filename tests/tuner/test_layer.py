"""What a masked layer computes once it is only read, beside `W * M` written out, whatever changes between forwards."""

import gc
import io
import weakref
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from maskft import MaskConfig, find_group
from maskft.masks import unpack_mask
from maskft.tuner import MaskLayer
from maskft.tuner import adapter_masks as group_module
from maskft.tuner.layer import initial_scores


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@pytest.fixture
def model(tmp_path) -> PeftModel:
    """A layer with two adapters that were loaded to be read; both have been used."""
    for name, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(0)
        config = MaskConfig(target_modules=["proj"], density=0.5, seed=seed)
        get_peft_model(Block(), config).save_pretrained(tmp_path / name)
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Block(), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("second", "first", "first"):
        model.set_adapter(name)
        with torch.no_grad():
            model(torch.ones(1, 12))
    return model


def layer_of(model: PeftModel) -> MaskLayer:
    layer = model.base_model.model.proj
    assert isinstance(layer, MaskLayer)
    return layer


def written_out(model: PeftModel, x: Tensor, *names: str) -> Tensor:
    """`x @ (W * M).T + b` with the masks of these adapters, of the weights as they are now."""
    layer = layer_of(model)
    weight = layer.base_layer.weight
    for name in names:
        weight = weight * unpack_mask(layer.maskft_mask[name], 12)
    return F.linear(x.to(weight.dtype), weight, layer.base_layer.bias)


def change_in_place(model: PeftModel) -> None:
    with torch.no_grad():
        layer_of(model).base_layer.weight.mul_(2)


def frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def replace_parameter(model: PeftModel) -> None:
    """By one that was changed in place as often."""
    base = layer_of(model).base_layer
    weight = torch.randn(10, 12)
    with torch.no_grad():
        while weight._version < base.weight._version:
            weight += 1
        base.weight = frozen(weight)
    assert base.weight._version == weight._version


def replace_values(model: PeftModel) -> None:
    """By an assignment to `.data`, which counts no version up; the second can take the memory that the first left."""
    weight = layer_of(model).base_layer.weight
    weight.data = weight.data * 2
    weight.data = weight.data + 1


def load_other_masks(model: PeftModel) -> None:
    """By name, into the memory that they lie in."""
    state = {name: value for name, value in model.state_dict().items() if "maskft_mask" in name}
    assert len(state) == 2
    model.load_state_dict({name: value.roll(1, 0) for name, value in state.items()}, strict=False)


# What is done between two forwards, and whose masks the second has to apply where they are others.
Changes = dict[str, tuple[Callable[[PeftModel], object], tuple[str, ...] | None]]
OF_ANY: Changes = {
    "nothing": (lambda model: None, None),
    "the weight in place": (change_in_place, None),
    "another weight": (replace_parameter, None),
    "other values": (replace_values, None),
    "another bias": (lambda model: setattr(layer_of(model).base_layer, "bias", frozen(torch.randn(10))), None),
    "another base layer": (
        lambda model: setattr(layer_of(model), "base_layer", nn.Linear(12, 10).requires_grad_(False)),
        None,
    ),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), ()),
    "float64": (lambda model: model.double(), None),
}
CHANGES: Changes = OF_ANY | {
    "another adapter": (lambda model: model.set_adapter("second"), ("second",)),
    "both adapters": (lambda model: model.base_model.set_adapter(["first", "second"]), ("first", "second")),
    "another mask": (lambda model: layer_of(model).set_mask("first", torch.full((10, 2), 5, dtype=torch.uint8)), None),
    "other masks by name": (load_other_masks, None),
    "merged": (lambda model: model.merge_adapter(), None),
    "merged and unmerged again": (lambda model: (model.merge_adapter(), model.unmerge_adapter()), None),
    "merged with another": (lambda model: model.merge_adapter(["first", "second"]), ("first", "second")),
    "deleted": (lambda model: (model.set_adapter("second"), model.delete_adapter("first")), ("second",)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_sees_what_changed_since_the_last_one(model, change) -> None:
    act, names = CHANGES[change]
    assert layer_of(model)._ready is not None
    act(model)
    x = torch.randn(3, 12, dtype=layer_of(model).base_layer.weight.dtype)
    expected = written_out(model, x, *(("first",) if names is None else names))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_replica_of_data_parallel_uses_its_own_weight(model) -> None:
    layer = layer_of(model)
    replica, base = (module._replicate_for_data_parallel() for module in (layer, layer.base_layer))
    replica.base_layer, base._parameters = base, {}
    base.weight, base.bias = layer.base_layer.weight * 2, layer.base_layer.bias * 2  # plain tensors, as there
    x = torch.randn(3, 12)
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            assert torch.equal(replica(x), 2 * expected)
        assert torch.equal(model(x), expected)


def test_an_input_of_another_dtype_is_cast_and_autocast_is_followed(model) -> None:
    x = torch.randn(3, 12)
    with torch.no_grad():
        assert model(x.double()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        assert model(x).dtype == torch.float32


def test_an_adapter_added_for_training_gets_its_gradient(model) -> None:
    model.add_adapter("trained", MaskConfig(target_modules=["proj"], density=0.5))
    model.set_adapter("trained")
    model(torch.randn(3, 12)).sum().backward()
    assert find_group(model, "trained").layers["proj"].maskft_scores["trained"].grad is not None


def test_a_list_of_adapters_that_its_owner_changes_later(model) -> None:
    names = ["first"]
    layer = layer_of(model)
    layer.set_adapter(names)
    x = torch.randn(3, 12)
    with torch.no_grad():
        model(x)
        names.append("second")
        assert torch.equal(model(x), written_out(model, x, *layer.active_adapters))


@pytest.fixture
def learner() -> PeftModel:
    """A layer whose scores have been trained for one forward, and the next of which finds the same."""
    torch.manual_seed(0)
    model = get_peft_model(Block(), MaskConfig(target_modules=["proj"], density=0.5))
    model.add_adapter("other", MaskConfig(target_modules=["proj"], density=0.8, seed=3))
    model(torch.ones(1, 12))
    return model


def scores_of(model: PeftModel, name: str = "default") -> nn.Parameter:
    return layer_of(model).maskft_scores[name]


def learn(model: PeftModel) -> None:
    scores_of(model).grad = torch.randn(10, 12)
    torch.optim.AdamW([scores_of(model)], lr=1.0, fused=True).step()


LEARNING: Changes = OF_ANY | {
    "a step": (learn, None),
    "scores in place": (torch.no_grad()(lambda model: scores_of(model).neg_().add_(0.01)), None),
    "scores by assignment": (lambda model: setattr(scores_of(model), "data", torch.randn(10, 12)), None),
    "other scores": (
        lambda model: layer_of(model).maskft_scores.update({"default": nn.Parameter(torch.randn(10, 12))}),
        None,
    ),
    "another adapter": (lambda model: model.set_adapter("other"), ("other",)),
    "no masked weight kept": (lambda model: setattr(find_group(model, "default"), "keeps_masked_weights", False), None),
}


@pytest.mark.parametrize("change", LEARNING)
def test_a_forward_that_learns_sees_what_changed_since_the_last_one(learner, change) -> None:
    act, names = LEARNING[change]
    names = ("default",) if names is None else names
    assert layer_of(learner)._ready is not None
    act(learner)
    x = torch.randn(3, 12, dtype=layer_of(learner).base_layer.weight.dtype)
    for _ in range(2):
        output = learner(x)
        torch.testing.assert_close(output, written_out(learner, x, *names), rtol=0, atol=0)
    scores = scores_of(learner, *names)
    scores.grad = None
    if names:
        output.sum().backward()
        expected = x.sum(0).expand(10, 12) * layer_of(learner).base_layer.weight * scores.sign()
        torch.testing.assert_close(scores.grad.to(x.dtype), expected)
    else:
        assert not output.requires_grad


def test_a_forward_that_learns_sees_autocast_and_what_needs_no_gradient(learner) -> None:
    x = torch.randn(3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert learner(x).dtype == torch.bfloat16
    assert learner(x).dtype == torch.float32
    scores_of(learner).requires_grad_(False)
    assert not learner(x).requires_grad
    scores_of(learner).requires_grad_()
    with torch.no_grad():
        assert not learner(x).requires_grad
    assert learner(x).requires_grad


def test_a_weight_that_is_to_learn_beside_its_mask_is_told_of(learner) -> None:
    layer_of(learner).base_layer.weight.requires_grad_(True)
    layer_of(learner)._ready = None
    with pytest.warns(UserWarning, match="weight of a masked layer requires a gradient and gets none"):
        learner(torch.randn(3, 12)).sum().backward()
    assert layer_of(learner).base_layer.weight.grad is None


def test_a_model_that_moves_leaves_nothing_where_it_was(learner) -> None:
    layer = layer_of(learner)
    learner(torch.ones(1, 12))
    left = [weakref.ref(layer.base_layer.weight.data), weakref.ref(next(iter(layer._masked_weights.values())).values)]
    learner.to("meta")
    gc.collect()
    assert [tensor() for tensor in left] == [None, None]


def test_a_saved_model_holds_no_masked_weights() -> None:
    model = get_peft_model(Block(), MaskConfig(target_modules=["proj"], density=0.5))

    def size() -> int:
        file = io.BytesIO()
        torch.save(model, file)
        return file.tell()

    before = size()
    model(torch.ones(1, 12))
    assert size() == before


def test_a_switch_leaves_what_other_threads_are_looking_at_as_it_is(model) -> None:
    layer = layer_of(model)
    looked_at = layer._masked_weights
    before = dict(looked_at)
    model.set_adapter("second")
    model(torch.ones(1, 12))
    layer.set_mask("second", layer.maskft_mask["second"])
    model.delete_adapter("first")
    assert looked_at == before
    assert layer._masked_weights != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_are_float32_whatever_the_default_dtype_is(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        for init_scores in ("normal", "uniform"):
            config = MaskConfig(target_modules=["proj"], density=0.5, init_scores=init_scores)
            with torch.device("meta"):
                drawn = initial_scores(torch.ones(10, 12, device="cpu"), config, "proj")
            assert drawn.dtype == torch.float32
            assert drawn.device.type == "cpu"
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("keeps", [True, False])
def test_masks_chosen_in_inference_mode_serve_the_next_training_step(learner, keeps: bool) -> None:
    find_group(learner, "default").keeps_masked_weights = keeps
    layer = layer_of(learner)
    with torch.no_grad():
        layer.maskft_scores["default"].mul_(-1).add_(0.001)
    with torch.inference_mode():
        learner(torch.ones(1, 12))
    learner(torch.ones(1, 12)).sum().backward()
    assert layer.maskft_scores["default"].grad is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of what it uses
@pytest.mark.parametrize("what", ["step", "training step"])
def test_a_compiled_step_chooses_the_masks_that_a_plain_one_does(what: str) -> None:
    def masks(wrap: Callable[[Callable[[], object]], Callable[[], object]]) -> Tensor:
        torch.manual_seed(0)
        model = get_peft_model(Block(), MaskConfig(target_modules=["proj"], density=0.5))
        model(torch.ones(1, 12))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        step = wrap(optimizer.step) if what == "step" else optimizer.step

        def train() -> None:
            model(torch.linspace(-1, 1, 24).view(2, 12)).square().sum().backward()
            step()
            optimizer.zero_grad()

        train = wrap(train) if what == "training step" else train
        for _ in range(3):
            train()
        assert find_group(model, "default").num_refreshes == 4
        return layer_of(model).maskft_mask["default"]

    assert torch.equal(
        masks(lambda function: torch.compile(function, backend="eager")), masks(lambda function: function)
    )


def test_an_adapter_is_tied_to_the_base_as_it_is_when_it_is_saved(learner, tmp_path) -> None:
    learner.save_pretrained(tmp_path / "before")
    change_in_place(learner)
    learner.save_pretrained(tmp_path / "after")
    torch.manual_seed(0)
    base = Block()
    base.proj = deepcopy(layer_of(learner).base_layer)
    with torch.no_grad():
        output = PeftModel.from_pretrained(base, tmp_path / "after")(torch.ones(1, 12))
        assert torch.equal(output, learner(torch.ones(1, 12)))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("selection", ["topk", "global_topk", "threshold"])
def test_masks_of_a_model_that_lies_on_several_gpus(monkeypatch, selection: str) -> None:
    asked = []

    def select(scores: list[Tensor], **settings: object) -> tuple[list[Tensor], Tensor]:
        asked.append([tensor.device.index for tensor in scores])
        packed = [torch.empty(16, 2, dtype=torch.uint8, device=tensor.device) for tensor in scores]
        return packed, torch.zeros((), dtype=torch.int64, device=scores[0].device)

    monkeypatch.setattr(group_module, "select_packed", select)
    with FakeTensorMode():
        model = nn.Sequential(*(nn.Linear(16, 16, device="meta") for _ in range(3)))
        for i, layer in enumerate(model):
            layer.weight = nn.Parameter(torch.empty(16, 16, device=f"cuda:{i % 2}"))
        config = MaskConfig(target_modules=["0", "1", "2"], selection=selection, score_transform="none")
        group = find_group(get_peft_model(model, config), "default")
        asked.clear()
        group.refresh(anew=True)
        assert asked == [[0, 0, 0]] if selection == "global_topk" else [[0, 0], [1]]
        assert [mask.device.index for mask in group._packed().values()] == [0, 1, 0]
        assert group._num_flips.device == group._num_nan.device == torch.device("cuda:0")
