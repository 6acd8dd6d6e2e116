"""Files that are whole or as they were, whatever stops the writing."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text in one step, making its folder: who reads meanwhile has the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        new.write_text(text, "utf8")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
