"""`--push_to_hub` against a made-up hub, and what a card tells a hub of a run."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from runs import data, mask, settings
from test_run_report import CROSSFIT, TRAIN, UNMASKED

from hub_server import TOKEN, Hub
from maskft.errors import MaskftError, NoGainError
from maskft.training.arguments import MaskArguments
from maskft.training.crossfit import CrossFitArguments, run_crossfit
from maskft.training.hub import card_data
from maskft.training.run import run_sft, run_train

pytestmark = [
    pytest.mark.usefixtures("undrawn_reports"),
    # The hub's client uploads large files by its HTTP client's old argument.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]
RESULT = {"README.md", "report.html", "report.json", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = RESULT | {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        constants = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def pushed(**given: object) -> dict[str, object]:
    return {"push_to_hub": True, "hub_model_id": "me/result", "max_steps": 2} | given


def test_the_adapter_is_pushed_and_no_checkpoint(hub, train, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, logger="maskft")
    train(tmp_path / "run", **pushed(hub_revision="v1"))
    assert list(tmp_path.glob("run/checkpoint-*"))
    assert hub.repositories == ["me/result"]
    assert set(hub.files) == {("me/result", "v1", name) for name in ADAPTER}
    for (_, _, name), content in hub.files.items():
        assert content == (tmp_path / "run" / name).read_bytes()
    assert TOKEN.encode() not in b"".join(hub.files.values())
    assert "Others cannot load me/result without its base model" in caplog.text
    assert f"Pushed me/result to {hub.url}/me/result/commit/0." in caplog.text


def test_a_model_is_pushed_under_its_folders_name(hub, tiny_model, sums, tmp_path) -> None:
    run_sft(data(tiny_model, sums), settings(tmp_path / "tuned", **pushed(hub_model_id=None)))
    names = RESULT | {"config.json", "generation_config.json", "model.safetensors"}
    assert set(hub.files) == {("me/tuned", "main", name) for name in names}


def test_of_a_cross_fitting_the_adapter_alone_is_pushed(hub, tiny_model, sums, tmp_path) -> None:
    given = settings(tmp_path / "run", **pushed())
    run_crossfit(data(tiny_model, sums), given, MaskArguments(), CrossFitArguments(num_folds=2))
    assert set(hub.files) == {("me/result", "main", name) for name in ADAPTER}


def test_a_mask_without_a_gain_is_not_pushed(hub, tiny_model, sums, tmp_path) -> None:
    given = settings(tmp_path / "run", **pushed(learning_rate=1e-9))
    with pytest.raises(NoGainError):
        run_train(data(tiny_model, sums, validation_split_percentage=70), given, mask(), require_gain=True)
    assert not hub.files


@pytest.mark.parametrize(
    ("token", "name", "told"),
    [
        ("", "me/result", "needs a token that may write; run `hf auth login`"),
        ("another", "me/result", r"cannot open the repository 'me/result' \(.*401"),
        (TOKEN, "another/result", r"cannot open the repository 'another/result' \(.*403"),
        (TOKEN, "a/b/c", r"cannot open the repository 'a/b/c'"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_work(hub, token, name, told, train, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("maskft.training.run.load_model", None)  # no weights are loaded
    with pytest.raises(MaskftError, match=told):
        train(tmp_path / "run", **pushed(hub_model_id=name))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("constant", "value"), [("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)])
def test_no_hub_is_refused_before_work(hub, constant, value, train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)
    with pytest.raises(MaskftError, match=r"cannot open the repository 'me/result' \(.*HF_ENDPOINT, or leave it out"):
        train(tmp_path / "run", **pushed())
    assert not (tmp_path / "run").exists()


def test_a_push_that_fails_leaves_the_result(hub, train, tmp_path) -> None:
    hub.fails_at = "/commit/"
    with pytest.raises(MaskftError, match=r"did not take it \(.*507.*push it with hf upload me/result "):
        train(tmp_path / "run", **pushed())
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_card_tells_a_hub_of_the_run(tmp_path) -> None:
    difference = {"estimate": -0.02, "low": -0.03, "high": -0.01, "n": 40}
    report = (
        TRAIN | UNMASKED | {"model_name_or_path": "someone/tuned", "verdict": {"difference": difference, "p": 0.01}}
    )
    report["settings"] = report["settings"] | {"dataset_name": "someone/rows", "eval_dataset_name": "held_out.jsonl"}
    card = ModelCard(f"---\n{card_data(report, 'result')}\n---\n")
    assert (card.data.base_model, card.data.pipeline_tag) == ("someone/tuned", "text-generation")
    assert (card.data.datasets, card.data.metrics) == (["someone/rows"], ["loss", "nll_difference"])
    results = {result.metric_name: result for result in card.data.eval_results}
    assert [(r.metric_type, r.metric_value) for r in results.values()] == [
        ("loss", 1.25),
        ("loss", 1.375),
        ("nll_difference", -0.02),
    ]
    *_, verdict = results.values()
    assert verdict.metric_args == {"low": -0.03, "high": -0.01, "n": 40, "p": 0.01}
    assert {result.dataset_name for result in results.values()} == {"held_out.jsonl"}


def test_a_folder_is_no_base_model_of_a_hub(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    settings = CROSSFIT["settings"]
    settings = settings | {"data": settings["data"] | {"dataset_name": str(tmp_path / "rows.jsonl")}}
    report = CROSSFIT | {"model_name_or_path": str(tmp_path), "settings": settings}
    told = card_data(report, "result")
    assert (told.base_model, told.datasets, told.eval_results) == (None, None, None)
