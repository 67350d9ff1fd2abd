"""The file that names a saved tokenizer."""

import json
from pathlib import Path
from typing import Any

DESCRIPTION_FILE = "ssm_tokenizer.json"


def write_description(folder: Path, tokenizer: Any) -> None:
    """Writes a tokenizer's kind, size, end-of-text id and fingerprint."""
    description = {name: getattr(tokenizer, name) for name in ("kind", "vocab_size", "eos_id", "fingerprint")}
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
