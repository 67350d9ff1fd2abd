"""Small files that are whole or absent, whatever ends the process."""

import os
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Replaces the file at once, with its content on disk; a reader sees the old text or the new."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
