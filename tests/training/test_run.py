import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from runs import before_step, data, every, last_checkpoint, logits, mask, settings
from safetensors.torch import load_file, save_file
from same import assert_same_checkpoints, assert_same_files, logged, report_of
from transformers import AutoModelForCausalLM

from maskft.errors import MaskftError, TrainingDivergedError
from maskft.training import run as run_module
from maskft.training.prepare import check_model, load_splits, load_tokeniser
from maskft.training.resume import newest_complete_checkpoint
from maskft.training.run import run_sft, run_train
from maskft.training.trainer import MaskTrainer
from maskft.tuner import MaskConfig, find_group

pytestmark = pytest.mark.usefixtures("undrawn_reports")

UNEVALUATED = {"eval_strategy": "no", "load_best_model_at_end": False}


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list:
    """The trainers that runs build, to look into after the run."""
    built = []
    build = run_module.build_trainer
    monkeypatch.setattr(run_module, "build_trainer", lambda *args: built.append(build(*args)) or built[-1])
    return built


def test_a_learned_mask_is_what_was_trained_saved_and_merged(train, tiny_model, tmp_path, trainers) -> None:
    before = (tiny_model / "model.safetensors").read_bytes()
    base = {k: v.clone() for k, v in AutoModelForCausalLM.from_pretrained(tiny_model).state_dict().items()}
    report = train(tmp_path / "run")
    (trainer,) = trainers
    group = find_group(trainer.model, "default")

    for name, layer in group.layers.items():
        assert torch.equal(layer.get_base_layer().weight, base[f"{name}.weight"]), "a base weight has changed"
        assert not layer.get_base_layer().weight.requires_grad
    assert (tiny_model / "model.safetensors").read_bytes() == before

    assert sum(logged(report, "flips")) > 0
    assert len(logged(report, "kept_share")) == len(logged(report, "loss")) > 0
    assert logged(report, "kept_share") == pytest.approx([0.9] * len(logged(report, "loss")), abs=1e-3)

    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.uint8 for tensor in saved.values())
    for name, packed in group.masks().items():
        assert torch.equal(saved[f"base_model.model.{name}.maskft_mask"], packed)

    trained = logits(trainer.model)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "run")
    assert torch.equal(logits(loaded), trained)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), trained)
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(tiny_model)), trained)

    # The best checkpoint is kept, and the recorded validation loss is that of its hard mask.
    losses = logged(report, "eval_loss")
    assert report["best"] == {"metric": "eval_loss", "value": min(losses), "step": trainer.state.best_global_step}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    assert report_of(tmp_path / "run") == report
    assert report["mask"]["kept_share"] == group.kept_share()
    assert 0 < report["mask"]["reachable_share"] <= 1
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None, "a folder is no model of a hub"
    assert f"keeps {100 * group.kept_share():.3f} % of" in card.text
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert f"eval_loss {min(losses):.4f} (NLL per token in nats, mean over batches) at step" in page
    labels = trainer.train_dataset[0]["labels"]
    assert labels[-1] == 1, "the end token is not trained"
    assert labels[0] == -100, "the prompt is trained"


def test_the_loss_without_the_mask_is_told_and_changes_nothing(train, tmp_path, trainers, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", logger="maskft")
    given = every(1) | {"max_steps": 4, "dataloader_num_workers": 1}
    report = train(tmp_path / "told", **given)
    with trainers[0].model.disable_adapter():
        expected = trainers[0].evaluate()["eval_loss"]
    assert report["without_mask"] == {"eval_loss": pytest.approx(expected, abs=1e-6)}
    assert trainers[0].evaluate()["eval_loss"] != pytest.approx(expected, abs=1e-6)
    best = report["best"]["value"]
    told = f"Validation loss without the mask {expected:.4f}, with it {best:.4f}, which is optimistic: validation chose"
    for text in (caplog.text, *((tmp_path / "told" / name).read_text() for name in ("README.md", "report.html"))):
        assert told in text
    assert f"Wrote {tmp_path / 'told'} (the adapter, report.html, report.json)." in caplog.text

    monkeypatch.setattr(MaskTrainer, "loss_without_mask", lambda trainer: report["without_mask"]["eval_loss"])
    train(tmp_path / "plain", **given)
    assert_same_checkpoints(*(tmp_path / name / "checkpoint-4" for name in ("told", "plain")))

    # A run that goes on knows it.
    shutil.rmtree(tmp_path / "told" / "checkpoint-4")
    monkeypatch.setattr(MaskTrainer, "loss_without_mask", lambda trainer: math.inf)
    again = train(tmp_path / "told", **given, resume_from_checkpoint="auto")
    assert again["without_mask"] == report["without_mask"]


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_killed_run_resumes_to_the_same_mask(low_memory, train, tmp_path) -> None:
    given = every(4) | {"low_memory": low_memory, "save_total_limit": 3}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(straight, **given)
    with before_step(8, stop), pytest.raises(KeyboardInterrupt):
        train(killed, **given)
    # What a kill in the middle of the next save leaves behind.
    (killed / "checkpoint-12").mkdir()
    (killed / "checkpoint-12" / "adapter_model.safetensors").write_bytes(b"\x10")
    train(killed, **given, resume_from_checkpoint="auto")

    assert_same_files(straight / "adapter_model.safetensors", killed / "adapter_model.safetensors")
    last = [last_checkpoint(run) for run in (straight, killed)]
    assert last[0].name == last[1].name
    assert any(key.endswith("maskft_scores") for key in load_file(last[0] / "adapter_model.safetensors"))
    assert_same_checkpoints(*last)


@pytest.mark.parametrize("of_fsdp", [False, True])
def test_a_checkpoint_is_read_back_and_a_bad_one_never_resumed(of_fsdp, train, tmp_path, monkeypatch) -> None:
    save = MaskTrainer._save_optimizer_and_scheduler

    def save_badly(self, output_dir) -> None:
        save(self, output_dir)
        if self.state.global_step != 4:
            return
        file = Path(output_dir) / "adapter_model.safetensors"
        tensors = load_file(file)
        name = min(name for name in tensors if name.endswith("maskft_scores"))
        if of_fsdp:  # what it reads holds a part of the scores
            scores = {f"{name}.default": tensor for name, tensor in tensors.items() if name.endswith("maskft_scores")}
            torch.save(scores | {f"{name}.default": tensors[name][:3]}, file.with_name("pytorch_model_fsdp.bin"))
        else:
            tensors[name][len(tensors[name]) // 2 :] = 0
            save_file(tensors, file)

    monkeypatch.setattr(MaskTrainer, "_save_optimizer_and_scheduler", save_badly)
    with pytest.raises(MaskftError, match=r"was read back after it was saved, and does not hold"):
        train(tmp_path / "run", save_strategy="steps", save_steps=2, **UNEVALUATED)
    assert newest_complete_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


def test_sft_changes_every_weight_and_saves_a_plain_model(sft, tiny_model, tmp_path, trainers, caplog) -> None:
    caplog.set_level("INFO", logger="maskft")
    report = sft(tmp_path / "run", model_init_kwargs={"attn_implementation": "eager"})
    assert trainers[0].model.config._attn_implementation == "eager"
    assert "model_init_kwargs" not in caplog.text
    assert "without_mask" not in report
    assert caplog.messages[-1] == f"Wrote {tmp_path / 'run'} (the model, report.html, report.json)."
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert ModelCard.load(tmp_path / "run" / "README.md").data.library_name == "transformers"


def test_a_run_that_can_flip_nothing_and_has_no_validation_says_so(train, tmp_path, caplog) -> None:
    keep_all = mask(selection="threshold", init_scores="keep_all")
    report = train(tmp_path / "run", keep_all, learning_rate=1e-7, packing=True, max_length=64, **UNEVALUATED)
    assert "have no token to train on" not in caplog.text, "packed rows were taken for lost ones"
    assert "No weight can flip" in caplog.text
    assert "No weight flipped in the whole run" in caplog.text
    assert "not chosen by validation" in (tmp_path / "run" / "report.html").read_text()
    assert "without_mask" not in report


def test_the_last_weights_are_not_reported_with_the_best_loss(sft, tmp_path) -> None:
    rising = every(1) | {"max_steps": 3, "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    report = sft(tmp_path / "run", load_best_model_at_end=False, **rising)
    losses = logged(report, "eval_loss")
    assert losses[-1] > min(losses)
    assert report["best"] == {"metric": "eval_loss", "value": None, "step": None}
    assert f"(last evaluation: eval_loss {losses[-1]:.4f}" in (tmp_path / "run" / "README.md").read_text()


@contextmanager
def noted(checkpoint: Path) -> Iterator[dict]:
    """What callbacks have noted in a checkpoint, to be changed there."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    yield state["stateful_callbacks"]
    path.write_text(json.dumps(state))


def stop(*_: object) -> None:
    raise KeyboardInterrupt


ENDS = {
    "within an epoch": {"max_steps": 3},
    "the last": {"max_steps": 3, "load_best_model_at_end": False},
    "half an epoch": {"num_train_epochs": 0.5},
    "an epoch": {"num_train_epochs": 1},
    # At this rate the loss is soon no better than it was.
    "early": every(1) | {"early_stopping_patience": 1, "learning_rate": 1.0, "num_train_epochs": 3},
}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
def test_a_command_is_repeated_to_the_same_result(ends, sft, tmp_path, trainers, monkeypatch) -> None:
    given = {"lr_scheduler_type": "constant", "resume_from_checkpoint": "auto"} | ends
    sft(tmp_path / "run", **given)
    first = load_file(tmp_path / "run" / "model.safetensors")
    num_steps = trainers[0].state.global_step
    if "early_stopping_patience" in ends:
        assert num_steps < trainers[0].state.max_steps
    (tmp_path / "run" / "model.safetensors").unlink()  # as where a run was killed before it wrote its result
    with noted(newest_complete_checkpoint(tmp_path / "run")) as callbacks:
        callbacks["RunNotes"]["attributes"]["seconds"] += 1000
    monkeypatch.setattr(MaskTrainer, "training_step", stop)
    report = sft(tmp_path / "run", **given)
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert trainers[1].state.global_step == num_steps
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert logged(report, "eval_loss")
    assert 1000 <= report["seconds"] < 1500  # those of the first start are counted


def test_a_run_goes_on_with_what_it_was_begun_with_alone(train, sft, tiny_model, sums, tmp_path) -> None:
    given = every(1) | {"max_steps": 3, "resume_from_checkpoint": "auto"}
    folder = tmp_path / "run"
    train(folder, **given)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(sums.read_text().splitlines(keepends=True)[1:]))
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = AutoModelForCausalLM.from_pretrained(tiny_model)
    weights.model.layers[1].mlp.up_proj.weight.data.add_(1)
    weights.save_pretrained(other)
    for model, rows, changes, config, told in (
        (tiny_model, sums, {}, {"density": 0.5}, "`density` = 0.9 and the run would go on with 0.5"),
        (tiny_model, fewer, {}, {}, "`hash of the train rows` = "),
        (other, sums, {}, {}, "`hash of the masked weights` = "),
    ):
        with pytest.raises(MaskftError, match=told):
            run_train(data(model, rows), settings(folder, **given | changes), mask(**config))
    with pytest.raises(MaskftError, match="holds a mask, from which maskft sft cannot go on"):
        sft(folder, **given)
    harmless = {"logging_steps": 1, "save_total_limit": 5}
    train(folder, **given | harmless)

    # A checkpoint of a version that noted nothing.
    with noted(folder / "checkpoint-2") as callbacks:
        del callbacks["RunNotes"]
    train(folder, **given | harmless | {"resume_from_checkpoint": str(folder / "checkpoint-2")})
    with noted(folder / "checkpoint-3") as callbacks:
        assert "learning_rate" in callbacks["RunNotes"]["attributes"]["facts"]


def test_validation_rows_that_are_trained_on_are_warned_of_and_show_no_gain(tiny_model, sums, caplog) -> None:
    given = data(tiny_model, sums, eval_dataset_name=str(sums)), settings("unused")
    tokenise = load_tokeniser(str(tiny_model), given[1])
    load_splits(*given, tokenise)
    assert "60 of 60 validation rows have the prompt of a training row" in caplog.text
    with pytest.raises(MaskftError, match=r"60 of 60 validation rows .* can show no gain; give other problems"):
        load_splits(*given, tokenise, require_gain=True)


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"chat_template_path": "absent"}, "`chat_template_path` 'absent' is neither a .jinja file nor a model"),
        ({"pad_token": "<zz>"}, "cannot be set up with these settings and rows: The specified `pad_token`"),
        ({"eos_token": "<none>"}, "`eos_token` '<none>' is no token of"),
        ({"assistant_only_loss": True}, "line 1: `assistant_only_loss` is for messages"),
        ({"model_init_kwargs": {"a": 1}}, "The model cannot be loaded with `model_init_kwargs` {'a': 1}"),
    ],
)
def test_what_trl_or_transformers_refuse_is_one_sentence(given, told, train, tmp_path) -> None:
    with pytest.raises(MaskftError) as error:
        train(tmp_path / "run", **given)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_no_result(train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(MaskTrainer, "compute_loss", lambda *_, **__: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(TrainingDivergedError, match=r"became nan in step 1.*Lower the learning rate"):
        train(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_loss_that_is_no_number_since_the_model_is_damaged_says_so(tmp_path, tiny_model, sums) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingDivergedError, match=r"norm.weight` holds NaN .*download it again"):
        run_sft(data(folder, sums), settings(tmp_path / "run", **UNEVALUATED))


@pytest.mark.parametrize("kind", ["train", "sft"])
def test_a_value_that_is_no_number_after_the_last_step_leaves_no_result(kind, train, sft, tmp_path) -> None:
    run = train if kind == "train" else sft
    changes = {"max_steps": 1, "eval_strategy": "no", "load_best_model_at_end": False}
    step = torch.optim.AdamW.step

    def spike(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        self.param_groups[0]["params"][-1].grad[0] = math.inf
        return step(self, *args, **kwargs)

    with mock.patch.object(torch.optim.AdamW, "step", spike), pytest.raises(MaskftError, match=r"no finite|are NaN"):
        run(tmp_path / "run", **changes)
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["train", "sft"])
def test_a_validation_loss_that_is_no_number_leaves_no_result(kind, train, sft, tmp_path, monkeypatch) -> None:
    plain = MaskTrainer.compute_loss

    def compute_loss(self: MaskTrainer, model: torch.nn.Module, *args: object, **kwargs: object) -> object:
        return plain(self, model, *args, **kwargs) if model.training else torch.tensor(math.nan)

    monkeypatch.setattr(MaskTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr(MaskTrainer, "prediction_step", lambda *_, **__: (torch.tensor(math.nan), None, None))
    run = train if kind == "train" else sft
    with pytest.raises(TrainingDivergedError, match="validation loss became nan after step"):
        run(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_what_is_written_over_stays_until_training_begins(tiny_model, sums, tmp_path, monkeypatch) -> None:
    output = tmp_path / "run"
    again = data(tiny_model, sums, overwrite_output_dir=True)

    def names() -> set[str]:
        return {path.name for path in output.iterdir()}

    run_sft(data(tiny_model, sums), settings(output, max_steps=1))
    before = names()
    with pytest.raises(MaskftError, match="raise max_length"):
        run_train(again, settings(output, max_length=1), mask())
    assert names() == before
    run_train(again, settings(output, max_steps=1), mask())
    assert {"adapter_model.safetensors", "checkpoint-1"} <= names()
    assert not names() & {"config.json", "generation_config.json", "model.safetensors"}
    # Nor is what was there taken for the result of a run that ends before its first checkpoint.
    monkeypatch.setattr(MaskTrainer, "_save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        run_train(again, settings(output, **every(1)), mask(density=0.5))
    assert not [name for name in names() if name.startswith(("checkpoint-", "adapter_model"))]


def test_what_a_run_would_write_over_or_cannot_read_is_refused_first(tiny_model, sums, tmp_path) -> None:
    reference = shutil.copytree(tiny_model, tmp_path / "before")
    of_change = mask(reference="pretrained", reference_model_name_or_path=str(reference))
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    again, chat = {"overwrite_output_dir": True}, {"eval_dataset_name": str(tmp_path / "chat.jsonl")}
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "report.json").write_text("{}")
    for model, output, config, changes, told in (
        (tiny_model, tiny_model, mask(), again, "holds the model to start from"),
        (tiny_model, tiny_model.parent, mask(), again, "holds the model to start from"),
        (tiny_model, reference, of_change, again, "holds the reference model"),
        (tmp_path / "no-model", tmp_path / "done", mask(), {}, "--overwrite_output_dir"),
        (
            tiny_model,
            tmp_path / "run",
            mask(),
            chat,
            "line 1: messages need a chat template, and the tokenizer has none",
        ),
    ):
        with pytest.raises(MaskftError, match=told):
            run_train(data(model, sums, **changes), settings(output), config)


def test_a_folder_to_validate_on_gives_its_validation_rows(tiny_model, sums, tmp_path) -> None:
    lines = sums.read_text().splitlines(keepends=True)
    for name, some in (("train", lines[:40]), ("validation", lines[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    given = data(tiny_model, tmp_path, eval_dataset_name=str(tmp_path)), settings("unused")
    (train, validation), found = load_splits(*given, load_tokeniser(str(tiny_model), given[1]))
    assert found[str(tmp_path)]["kept"] == 20
    assert (len(train), len(validation)) == (40, 20)
    assert not set(train["prompt"]) & set(validation["prompt"])


def test_the_mask_is_checked_against_the_model_without_its_weights(tiny_model, tmp_path) -> None:
    assert check_model(str(tiny_model), mask()) == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 40 * 32)
    with pytest.raises(MaskftError, match="names layer 7, but the model has layers 0 to 2"):
        check_model(str(tiny_model), MaskConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    with pytest.raises(MaskftError, match="No model can be read from"):
        check_model(str(tmp_path / "missing"), mask())


def test_a_checkpoint_lacks_no_weight_but_tied_ones() -> None:
    tied = Mock(all_tied_weights_keys={"lm_head.weight": "model.embed_tokens.weight"})
    load = partial(MaskTrainer._issue_warnings_after_load, Mock(model=tied))
    load(Mock(missing_keys=["lm_head.weight"]))
    tied.tie_weights.assert_called_once_with()
    with pytest.raises(MaskftError, match=r"The checkpoint lacks model\.norm\.weight; remove it"):
        load(Mock(missing_keys=["model.norm.weight", "lm_head.weight"]))
