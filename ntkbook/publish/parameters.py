"""Checking parameters before a run: papermill itself only warns of an unknown name, and never looks at types."""

import ast
import contextlib
import difflib
import os
import tempfile
from collections.abc import Mapping
from typing import Any

KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "list": (list,),
    "tuple": (list, tuple),
    "dict": (dict,),
    "None": (type(None),),
}


class ParameterError(ValueError):
    """A parameter that the chapter does not have, or a value of another type than the chapter declares."""


def check_parameters(nb: Any, values: Mapping[str, Any], chapter: str) -> None:
    """Compare overrides with the chapter's parameters cell.

    Args:
        nb: the chapter's notebook.
        values: overrides by name.
        chapter: its name, for the messages.

    Raises:
        ParameterError: an unknown name (the message names near ones), or a value of the wrong type.
    """
    if not values:
        return
    known = declared(nb)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise ParameterError(f"{chapter} has no parameter {name!r}; {hint}")
        kind = known[name]
        if not _fits(value, kind):
            raise ParameterError(
                f"{chapter}: parameter {name!r} is {kind}, got {value!r} ({type(value).__name__}); "
                "write values as YAML, such as 'seed: 3'"
            )


def declared(nb: Any) -> dict[str, str]:
    """The chapter's parameters and their types: as annotated, else the type of the default."""
    import nbformat
    from papermill import inspect_notebook

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "chapter.ipynb")
        nbformat.write(nb, path)
        found = inspect_notebook(path)
    return {name: _kind(p["inferred_type_name"], p["default"]) for name, p in found.items()}


def _kind(annotation: str | None, default: str) -> str:
    if annotation and annotation != "None":
        return annotation
    with contextlib.suppress(ValueError, SyntaxError):
        return type(ast.literal_eval(default)).__name__
    return "anything"


def _fits(value: Any, kind: str) -> bool:
    options = [option.strip() for option in kind.split("|")]
    return any(_fits_one(value, option) for option in options)


def _fits_one(value: Any, kind: str) -> bool:
    base, _, inner = kind.partition("[")
    if base not in KINDS:
        return True  # a type of the chapter's own: its code must check it
    if isinstance(value, bool) and base != "bool":
        return False
    if not isinstance(value, KINDS[base]):
        return False
    if isinstance(value, list) and base == "list" and inner:
        return all(_fits(item, inner.removesuffix("]")) for item in value)
    return True
