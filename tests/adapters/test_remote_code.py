"""A model's own code is never run, and nobody is asked whether it may be."""

import ast
import builtins
import json
import shutil
from pathlib import Path

import pytest
from peft import get_peft_model
from tiny_adapters import load

import maskft
import maskft_lab
from maskft import MaskConfig, cli
from maskft.adapters import model_layout
from maskft.adapters.model_files import load_model
from maskft.adapters.model_layout import read_layout
from maskft.errors import MaskftError
from maskft.tuner.reference import load_reference

CODE = "from pathlib import Path\nPath({!r}).write_text('ran')\n"


@pytest.fixture
def hostile(tmp_path, tiny_model) -> Path:
    """A model whose files ask for code that leaves a file behind, wherever Transformers would look for it."""
    folder = shutil.copytree(tiny_model, tmp_path / "hostile")
    (folder / "custom_generate").mkdir()
    for name in ("code.py", "custom_generate/generate.py"):
        (folder / name).write_text(CODE.format(str(tmp_path / "ran")))
    maps = {"config.json": ("AutoConfig", "AutoModelForCausalLM"), "tokenizer_config.json": ("AutoTokenizer",)}
    for name, kinds in maps.items():
        own = {kind: ["code.C", None] if kind == "AutoTokenizer" else "code.C" for kind in kinds}
        change(folder / name, auto_map=own)
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("model_type", ["llama", "of_its_own"])
@pytest.mark.parametrize(
    "command", ["sft", "train", "restore", "crossfit", "eval", "merge", "inspect", "search", "landscape"]
)
def test_no_command_runs_a_models_code_or_asks(tmp_path, hostile, sums, monkeypatch, command, model_type) -> None:
    get_peft_model(load(hostile), MaskConfig()).save_pretrained(tmp_path / "adapter")
    change(hostile / "config.json", model_type=model_type)
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "y")
    data = ["--model_name_or_path", str(hostile), "--dataset_name", str(sums), "--max_steps", "1"]
    adapter = ["--adapter_name_or_path", str(tmp_path / "adapter")]
    flags = {
        "eval": ["--models", f"{hostile},{hostile}+{tmp_path / 'adapter'}", "--tasks", f"nll:{sums}", "--limit", "4"],
        "merge": adapter,
        "inspect": adapter,
        "restore": [*data, "--reference_model_name_or_path", str(hostile), "--retain_dataset_name", str(sums)],
        "landscape": [*data[:4], *adapter],
    }.get(command, data)
    if command != "inspect":
        flags += ["--output_dir", str(tmp_path / "out")]
    status = cli.main([command, *flags])
    assert not asked
    assert not (tmp_path / "ran").exists()
    assert status in (0, 2)


def test_every_reader_of_a_repository_is_told_to_trust_no_code() -> None:
    own = ("MaskConfig", "PeftConfig", "PeftModel", "GenerationConfig")  # which know no code
    found = 0
    for package in (maskft, maskft_lab):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
                name = ast.unparse(call.func)
                if not name.endswith(("from_pretrained", "AutoModelForCausalLM.from_config")) or name.startswith(own):
                    continue
                told = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                of_its_class = name.startswith("type(")  # the class is there already, and none is looked up
                assert of_its_class or told.get("trust_remote_code") == "False" or None in told, f"{path}: {name}"
                found += 1
    assert found >= 6


@pytest.mark.parametrize(
    "named",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "kernels-community/flash-attn2"},
        {"attn_implementation": {"": "someone/kernel@main:f"}},
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"parts": [{"experts_implementation": "someone/kernel"}]},
    ],
)
def test_a_kernel_on_a_hub_is_the_users_choice_alone(tmp_path, tiny_model, named, monkeypatch) -> None:
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", None)  # which would fetch it
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    change(folder / "config.json", **named)
    for given in ({}, {"attn_implementation": "eager"}):  # which Transformers lets the file's own key win over
        with pytest.raises(MaskftError, match="is code on a hub; take it out, or name it in --model_init_kwargs"):
            load_model(str(folder), "float32", given)
    if isinstance(kernel := next(iter(named.values())), str):
        with pytest.raises(MaskftError, match="'NoneType' object is not callable"):  # where it would be fetched
            load_model(str(folder), "float32", {"attn_implementation": kernel})
    if "text_config" not in named:  # which a Llama has not
        assert read_layout(folder).layers  # a look at its structure loads nothing
    model = load(tiny_model)
    model.model.layers[0].mlp.up_proj.weight.data += 1
    config = MaskConfig(reference="pretrained", reference_model_name_or_path=str(folder))
    with pytest.raises(MaskftError, match="is code on a hub"):
        load_reference(config, model, {n: m for n, m in model.named_modules() if n.endswith("up_proj")})


@pytest.mark.parametrize(
    "harm",
    [
        {"hidden_size": "a"},
        {"hidden_size": 0},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": []},
        {"vocab_size": 2**63},
        {"rope_scaling": 7},
        {"hidden_act": {}},
        {"model_type": ["llama"]},
        {"architectures": [3]},
        {"dtype": "Tensor"},
        {"rms_norm_eps": None},
        {"layer_types": [[]]},
        {"quantization_config": 3},
    ],
)
@pytest.mark.parametrize("command", ["inspect", "sft"])
def test_configurations_of_base_models_may_hold_anything(
    tmp_path, tiny_model, sums, harm, command, monkeypatch
) -> None:
    monkeypatch.setattr(model_layout, "_MAX_MODULES", 1000)
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    get_peft_model(load(folder), MaskConfig()).save_pretrained(tmp_path / "adapter")
    change(folder / "config.json", **harm)
    given = ["--model_name_or_path", str(folder), "--dataset_name", str(sums), "--output_dir", str(tmp_path / "out")]
    if command == "inspect":
        given = ["--adapter_name_or_path", str(tmp_path / "adapter")]
    assert cli.main([command, *given, *(["--max_steps", "1"] if command == "sft" else [])]) in (0, 2)
