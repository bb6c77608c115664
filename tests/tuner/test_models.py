"""The same contract on every kind of model: which modules are masked, what they compute, what they leave alone."""

import copy
import logging

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import X, chosen, layers_of, load, logits, plain_weights, refused, step
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from maskft import MaskConfig, find_group
from maskft.tuner import check_targets

TOKENS = {"bos_token_id": 1, "eos_token_id": 1}
SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
} | TOKENS
GPT2_SIZES = {"vocab_size": 48, "n_embd": 16, "n_head": 2, "n_positions": 32} | TOKENS
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "llama": ("llama", SIZES),
    "qwen3": ("qwen3", SIZES),
    # With biases, so that they are seen to be used and left alone.
    "llama_bias": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", SIZES | {"sliding_window": 4}),
    "gemma3": ("gemma3_text", SIZES | {"sliding_window": 4}),
    "gpt2": ("gpt2", GPT2_SIZES | NO_DROPOUT),
    "qwen3_moe": ("qwen3_moe", SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}),
    "mixtral": ("mixtral", SIZES | {"num_local_experts": 4}),
}
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
EXPECTED = {
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "qwen3_moe": ("model.layers", ATTENTION),
    "mixtral": ("model.layers", ATTENTION),
}
TIED = ("gemma3", "gpt2")
MOE = ("qwen3_moe", "mixtral")


def build(kind: str, num_layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    model_type, settings = MODELS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings, num_hidden_layers=num_layers))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def full_names(kind: str, layers: list[int]) -> list[str]:
    prefix, modules = EXPECTED.get(kind, ("model.layers", ATTENTION + MLP))
    return [f"{prefix}.{layer}.{module}" for layer in layers for module in modules]


def with_masks(plain: PreTrainedModel, model: PeftModel) -> PreTrainedModel:
    """A plain model whose weights are multiplied by the masks, chosen here from the scores."""
    plain = copy.deepcopy(plain)
    for name, layer in layers_of(model).items():
        module, mask = plain.get_submodule(name), chosen(layer, density=0.7)
        module.weight.data *= mask.T if isinstance(module, Conv1D) else mask
    return plain


@pytest.fixture(params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_default_targets_are_every_linear_layer_of_attention_and_mlp_alone(kind, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="maskft"):
        model = get_peft_model(build(kind), MaskConfig())
    assert sorted(layers_of(model)) == sorted(full_names(kind, [0, 1]))
    if kind == "llama":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        assert model.peft_config["default"].target_modules == sorted(names)
    warned = [record.getMessage() for record in caplog.records]
    if kind in MOE:
        assert len(warned) == 1
        assert "2 modules keep several weights in one tensor" in warned[0]
        assert "`model.layers.0.mlp.experts`" in warned[0]
    else:
        assert not warned
    model = get_peft_model(build(kind, num_layers=12), MaskConfig(layers_to_transform=[1]))
    assert sorted(layers_of(model)) == sorted(full_names(kind, [1])), "layer 1 is not layer 10"


def test_forward_is_that_of_the_masked_weights_bit_for_bit(kind) -> None:
    plain = build(kind)
    model = get_peft_model(copy.deepcopy(plain), MaskConfig(density=0.7))
    expected = logits(with_masks(plain, model))
    assert not torch.equal(expected, logits(plain))
    assert torch.equal(logits(model), expected)
    assert torch.equal(model(input_ids=X).logits, expected), "with gradients"
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))


def test_scores_get_the_straight_through_gradient(kind) -> None:
    plain = build(kind).double()
    if kind in MOE:
        plain.set_experts_implementation("eager")  # the grouped kernel has no float64
    model = get_peft_model(copy.deepcopy(plain), MaskConfig(density=0.7))
    masked = with_masks(plain, model)
    model(input_ids=X, labels=X).loss.backward()
    masked(input_ids=X, labels=X).loss.backward()
    for name, layer in layers_of(model).items():
        grad, weight = masked.get_submodule(name).weight.grad, plain.get_submodule(name).weight
        if isinstance(plain.get_submodule(name), Conv1D):
            grad, weight = grad.T, weight.T
        scores = layer.maskft_scores["default"]
        assert scores.grad.abs().max() > 0
        torch.testing.assert_close(scores.grad.double(), grad * weight * scores.sign(), rtol=1e-6, atol=1e-12)


def test_training_changes_no_byte_of_the_model_and_an_adapter_tells_all(kind, tmp_path) -> None:
    plain = build(kind)
    model = get_peft_model(copy.deepcopy(plain), MaskConfig(density=0.7, task_type="CAUSAL_LM"))
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"maskft_scores"}
    optimizer = step(model)
    for _ in range(2):
        step(model, optimizer)
    assert find_group(model, "default").take_flips() > 0
    before = plain_weights(plain)
    assert plain_weights(model) == before

    trained = logits(model)
    assert torch.equal(trained, logits(with_masks(plain, model)))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, build(kind))
    assert torch.equal(logits(loaded), trained)
    merged = loaded.merge_and_unload()
    assert torch.equal(logits(merged), trained)
    after = plain_weights(merged)
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if value != before[name]}
    assert changed == {f"{name}.weight" for name in full_names(kind, [0, 1])}
    if kind in TIED:
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight

    model.merge_adapter()
    assert torch.equal(logits(model), trained)
    model.unmerge_adapter()
    assert plain_weights(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 11)])
def test_a_transposed_layer_rounds_as_it_does_merged(dtype, shape) -> None:
    model = get_peft_model(build("gpt2").to(dtype), MaskConfig(density=0.7))
    x = torch.arange(shape[0] * shape[1]).view(shape)
    trained = model(input_ids=x).logits
    model.requires_grad_(False)
    loaded = model(input_ids=x).logits
    model.merge_adapter()
    assert torch.equal(trained, model(input_ids=x).logits)
    assert torch.equal(trained, loaded)


@pytest.mark.parametrize("moe", MOE)
@pytest.mark.parametrize("target", ["experts", "gate"])
def test_what_holds_several_weights_in_one_tensor_is_refused_by_name(moe, target) -> None:
    with refused(rf"`model\.layers\.0\.mlp\.{target}` cannot be masked: it is a \w+"):
        get_peft_model(build(moe), MaskConfig(target_modules=[target]))


def test_names_that_occur_outside_the_layers_too_are_made_longer() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 2}
    masked = layers_of(get_peft_model(BertForMaskedLM(BertConfig(vocab_size=48, **sizes)), MaskConfig()))
    one = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    one += ["intermediate.dense", "output.dense"]
    assert sorted(masked) == sorted(f"bert.encoder.layer.{i}.{name}" for i in range(2) for name in one)


def test_what_is_read_and_not_called_is_left_out(caplog) -> None:
    sizes = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    with caplog.at_level(logging.WARNING, logger="maskft"):
        masked = get_peft_model(copy.deepcopy(model), MaskConfig())
    names = [f"backbone.layers.{i}.mixer.in_proj" for i in range(2)]
    assert sorted(layers_of(masked)) == names
    assert "6 linear layers are not masked" in caplog.text
    assert "MambaMixer reads its weight instead of calling it" in caplog.text
    for name in ("dt_proj", "x_proj"):  # which Mamba's own kernels read in training
        with refused(f"{name}` cannot be masked: MambaMixer reads its weight"):
            get_peft_model(model, MaskConfig(target_modules=[name]))


def test_names_that_other_kinds_of_modules_have_too_are_made_longer() -> None:
    class Seeing(LlamaModel):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.patches = nn.ModuleDict({"up_proj": nn.Conv3d(1, 1, 1)})  # as vision models have

    model = Seeing(LlamaConfig(**SIZES, num_hidden_layers=2))
    for targets in (None, "all-linear"):
        layers = layers_of(get_peft_model(copy.deepcopy(model), MaskConfig(target_modules=targets)))
        assert len(layers) == 2 * 7
        assert "layers.1.mlp.up_proj" in layers


@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_a_model_with_adapters_of_another_method_is_refused_before_it_is_changed(targets) -> None:
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    before = list(model.state_dict())
    with refused(r"q_proj` has an adapter of another method .* \(merge_and_unload\(\)\)"):
        get_peft_model(model.base_model.model, MaskConfig(target_modules=targets))
    assert list(model.state_dict()) == before
    get_peft_model(model.merge_and_unload(), MaskConfig(target_modules=targets))


def test_hooks_that_will_not_run_are_told_of(caplog) -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    get_peft_model(model, MaskConfig())
    assert "The forward hooks of `model.layers.1.mlp.up_proj` do not run while it is masked" in caplog.text


class InPlace(nn.Module):
    """What a model with biases may do to what a linear layer gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x += 1
            x = self.relu(x)
        return x


def test_what_a_layer_with_a_bias_gives_may_be_changed_in_place() -> None:
    model = InPlace()
    x = torch.randn(2, 3, 8, requires_grad=True)
    masked = get_peft_model(model, MaskConfig(target_modules=["0", "1"]))
    out = masked(x)
    out.square().sum().backward()
    with torch.no_grad():
        assert torch.equal(masked(x), out)
    assert all(layer.maskft_scores["default"].grad.any() for layer in layers_of(masked).values())


class Router(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


SHARED = "`model.layers.0.mlp.up_proj` has the same weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda layers: setattr(layers[1].mlp, "up_proj", Router(16, 20, bias=False)),
            "it is a Router, which does more than multiply by its weight",
        ),
        (lambda layers: setattr(layers[1].mlp.up_proj, "weight", layers[0].mlp.up_proj.weight), SHARED),
        (lambda layers: setattr(layers[1].mlp, "up_proj", layers[0].mlp.up_proj), SHARED),
        (
            lambda layers: nn.utils.parametrizations.weight_norm(layers[1].mlp.up_proj),
            "its weight is no parameter of its own",
        ),
    ],
)
def test_a_module_that_is_more_than_its_weight_is_refused(change, reason) -> None:
    model = build("llama")
    change(model.model.layers)
    with refused(f"layers.1.mlp.up_proj` cannot be masked: .*{reason}"):
        get_peft_model(model, MaskConfig(target_modules=["up_proj"], layers_to_transform=[1]))
    masked = layers_of(get_peft_model(model, MaskConfig()))
    assert "model.layers.1.mlp.up_proj" not in masked
    assert "model.layers.1.mlp.down_proj" in masked


def test_what_stands_in_two_places_as_a_whole_is_masked_in_both() -> None:
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    masked = get_peft_model(model, MaskConfig(target_modules=["up_proj"], density=0.5))
    assert list(layers_of(masked)) == ["model.layers.0.mlp.up_proj"]
    assert model.model.layers[1].mlp.up_proj is layers_of(masked)["model.layers.0.mlp.up_proj"]


def experts() -> nn.ModuleDict:
    """Four layers of two experts, without anything above the list of layers."""
    layers = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(2))}) for _ in range(4)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


@pytest.mark.parametrize(
    ("bare", "settings", "start", "num_masked"),
    [
        (lambda: LlamaModel(LlamaConfig(**SIZES, num_hidden_layers=3)), {}, "layers.1.", 7),
        (lambda: GPT2Model(GPT2Config(**GPT2_SIZES, n_layer=3)), {}, "h.1.", 4),
        (experts, {"target_modules": ["0", "1"]}, "layers.1.experts.", 2),
        (experts, {"target_modules": ["0", "1"], "layers_pattern": "layers"}, "layers.1.experts.", 2),
    ],
)
def test_layers_of_a_bare_model_are_counted_as_those_of_a_whole_one(bare, settings, start, num_masked) -> None:
    layers = layers_of(get_peft_model(bare(), MaskConfig(layers_to_transform=[1], **settings)))
    assert len(layers) == num_masked
    assert all(name.startswith(start) for name in layers)


def test_layers_are_those_of_the_list_that_the_pattern_names() -> None:
    def stack(num_layers: int) -> nn.ModuleList:
        return nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(num_layers))

    def masked(pattern, *layers: int) -> list[str]:
        model = nn.ModuleDict({"layers": stack(6), "h": stack(2)})
        config = MaskConfig(target_modules=["q"], layers_to_transform=layers, layers_pattern=pattern)
        return list(layers_of(get_peft_model(model, config)))

    assert masked("h", 1) == ["h.1.q"]
    assert masked("layers", 1, 5) == ["layers.1.q", "layers.5.q"]
    assert masked(["layers", "h"], 1, 5) == ["layers.1.q", "layers.5.q", "h.1.q"]
    assert masked(None, 1) == ["layers.1.q", "h.1.q"]
    with refused("names layer 5, but the list of layers 'h' has layers 0 to 1; correct"):
        masked("h", 1, 5)
    with refused("names layer 1, but the list of layers 'blocks' has no numbered layers"):
        masked("blocks", 1)


def test_a_model_without_embeddings_can_be_masked(monkeypatch) -> None:
    def none(self: PreTrainedModel) -> None:
        raise NotImplementedError

    monkeypatch.setattr(LlamaForCausalLM, "get_input_embeddings", none)
    assert check_targets(MaskConfig(), build("llama"))


def test_offloaded_weights_are_refused() -> None:
    model = cpu_offload(build("llama"), execution_device=torch.device("cpu"))
    with refused(r"`model.layers.0.\S+` is offloaded to the CPU or the disk"):
        get_peft_model(model, MaskConfig())
