"""AlpacaEval 2 with the package's own judge code, talking to a server made up for the test."""

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from maskft.errors import MaskftError
from maskft.evaluation.alpaca import AlpacaEvalTask
from maskft.evaluation.runner import load_tasks
from maskft.evaluation.tasks import TaskSettings

pytest.importorskip("openai")


class Judge(BaseHTTPRequestHandler):
    """Prefers the answer that holds GOOD with a probability of 0.9, else is undecided."""

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        # The template shows model "m" first, then model "M".
        first = prompt.index("GOOD") < prompt.rindex('"M"') if "GOOD" in prompt else None
        p = 0.5 if first is None else 0.9 if first else 0.1
        tops = [{"token": t, "bytes": None, "logprob": v} for t, v in (("m", math.log(p)), ("M", math.log(1 - p)))]
        choice = {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": "m"},
            "logprobs": {"content": [tops[0] | {"top_logprobs": tops}]},
        }
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
        content = json.dumps(body | {"usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_API_BASE", f"http://127.0.0.1:{httpd.server_port}")
    yield
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rows = [{"instruction": f"Say {i}.", "output": f"baseline {i}", "dataset": "d"} for i in range(4)]
    (tmp_path / "alpaca_eval").mkdir()
    (tmp_path / "alpaca_eval" / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of the package's own calls
def test_the_judge_s_preference_is_the_win_rate(server: None, data_dir: Path) -> None:
    (task,) = load_tasks("alpaca_eval", TaskSettings(data_dir=data_dir, limit=3))
    assert isinstance(task, AlpacaEvalTask)
    assert len(task.items) == 3
    item = task.items[0]
    assert task.prompt(item, lambda messages: messages[0]["content"]) == item.content["instruction"]
    # Whichever place the package's coin gives the answer, the preference is turned back.
    for item in task.items:
        assert task.judge(item, "a GOOD answer").verdict["win_rate"] == pytest.approx(0.9)
    assert task.judge(item, "another").verdict["win_rate"] == pytest.approx(0.5)
    assert task.judge(item, "  ").verdict["win_rate"] == 0
    assert task.protocol()["matching"].startswith("weighted_alpaca_eval_gpt4_turbo")


def test_a_missing_file_is_named_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with pytest.raises(MaskftError, match=r"alpaca_eval_gpt4_baseline\.json, which is missing"):
        load_tasks("alpaca_eval", TaskSettings(data_dir=tmp_path))
    (tmp_path / "alpaca_eval").mkdir()
    (tmp_path / "alpaca_eval" / "alpaca_eval_gpt4_baseline.json").write_text('[{"prompt": "x"}]')
    with pytest.raises(MaskftError, match="must be a JSON list"):
        load_tasks("alpaca_eval", TaskSettings(data_dir=tmp_path))
