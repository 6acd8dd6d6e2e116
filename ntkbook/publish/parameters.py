"""A chapter's parameters, and checking them before a run: papermill itself only warns of an unknown name, and never
looks at types."""

import ast
import contextlib
import difflib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True)
class Parameter:
    """One line of a chapter's parameters cell: its name, type, default as Python writes it, and comment."""

    name: str
    kind: str
    default: str
    comment: str


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
                + _hint(value, kind)
            )


def from_here(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as a user gives them, with ``data_dir`` absolute, as the kernel does not stand where the user does."""
    folder = values.get("data_dir")
    return {**values, "data_dir": str(Path(folder).resolve())} if isinstance(folder, str) and folder else dict(values)


def declared(nb: Any) -> dict[str, str]:
    """The chapter's parameters and their types: as annotated, else the type of the default."""
    return {parameter.name: parameter.kind for parameter in parameters(nb)}


def parameters(nb: Any) -> list[Parameter]:
    """The chapter's parameters, in the order of its parameters cell."""
    import nbformat
    from papermill import inspect_notebook

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "chapter.ipynb")
        nbformat.write(nb, path)
        found = inspect_notebook(path)
    return [
        Parameter(name, _kind(p["inferred_type_name"], p["default"]), p["default"], p["help"])
        for name, p in found.items()
    ]


def _kind(annotation: str | None, default: str) -> str:
    if annotation and annotation != "None":
        return annotation
    with contextlib.suppress(ValueError, SyntaxError):
        return type(ast.literal_eval(default)).__name__
    return "anything"


def _hint(value: Any, kind: str) -> str:
    if isinstance(value, str) and "float" in kind:
        with contextlib.suppress(ValueError):
            return f"YAML takes {value} for text, write {float(value)!r}"  # it wants a point: 1.0e-3
    return "write values as YAML, such as 'seed: 3'"


def _fits(value: Any, kind: str) -> bool:
    try:
        return _fits_type(value, ast.parse(kind, mode="eval").body)
    except SyntaxError:
        return True


def _fits_type(value: Any, kind: ast.expr) -> bool:
    match kind:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits_type(value, left) or _fits_type(value, right)
        case ast.Subscript(value=ast.Name(id=base), slice=inner):
            items = inner
        case ast.Name(id=base):
            items = None
        case ast.Constant(value=None):
            return value is None
        case _:
            return True
    if base not in KINDS:
        return True  # a type of the chapter's own: its code must check it
    if isinstance(value, bool) and base != "bool":
        return False
    if not isinstance(value, KINDS[base]):
        return False
    if isinstance(value, list) and base == "list" and items:
        return all(_fits_type(item, items) for item in value)
    if isinstance(value, dict) and isinstance(items, ast.Tuple):
        return all(_fits_type(item, kind) for pair in value.items() for item, kind in zip(pair, items.elts))
    return True
