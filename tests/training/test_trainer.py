import pytest
from transformers import AutoTokenizer

from maskft.errors import MaskftError
from maskft.training.arguments import TrainingSettings
from maskft.training.trainer import MaskTrainer


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")
def test_a_pad_token_that_the_tokenizer_does_not_know_is_refused(tiny_model, tmp_path) -> None:
    settings = TrainingSettings(output_dir=str(tmp_path), pad_token="<zz>")
    with pytest.raises(MaskftError, match="`pad_token` is '<zz>', which the tokenizer does not know"):
        MaskTrainer(model=None, args=settings, processing_class=AutoTokenizer.from_pretrained(tiny_model))
