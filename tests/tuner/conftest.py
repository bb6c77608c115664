from pathlib import Path

import pytest
from peft import PeftModel
from tiny import masked, step


@pytest.fixture
def learned() -> PeftModel:
    """Masks that have learned for one step."""
    model = masked()
    step(model)
    return model


@pytest.fixture
def folder(learned: PeftModel, tmp_path: Path) -> Path:
    """Their adapter."""
    learned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
