"""A Sphinx extension for the API reference: docstrings in plain text as what Sphinx reads, with links between names."""

import re
from typing import Any

import ntkbook

NAME = re.compile(r"[A-Za-z_][\w.]*")
_PARAMETERS = re.compile(r"<dl>\n((?:<dd><em class=\"sig-param\".*</dd>\n)+)</dl>")


def restructured(lines: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText.

    What is in backticks becomes a link where it is a name that the reference has, and code elsewhere; what is indented
    below a paragraph is shown as it stands; |x|, * and a trailing _ mean themselves; a word in quotes is a string. Two
    entries on a line of a section such as "Args:", as in "x: (n, ...); y: (n,)", become two for sphinx.ext.napoleon.
    """
    lines = [entry for line in lines for entry in _entries(line)]
    blocks: list[tuple[bool, list[str]]] = [(False, [])]
    before = ""  # the last line that is not empty
    for i, line in enumerate(lines):
        literal, block = blocks[-1]
        indented = line.startswith("    ")
        starts = indented and not literal and i and not lines[i - 1].strip() and before and not before.startswith(" ")
        if starts or (literal and line.strip() and not indented):
            block = []
            blocks.append((not literal, block))
        block.append(line)
        before = line if line.strip() else before
    out: list[str] = []
    for literal, block in blocks:
        out += ["::", "", *block] if literal else _escaped("\n".join(block)).split("\n")
    return out


def _entries(line: str) -> list[str]:
    if not re.match(r" {4}\w+: ", line):
        return [line]
    *before, last = re.split(r"(?<=[;.]) (?=[a-z]\w*: )", line.strip())
    return ["    " + entry for entry in [*(entry.removesuffix(";") for entry in before), last]]


def _escaped(text: str) -> str:
    text = re.sub(r'(?<![^\s(])((?:\w+=)?"[\w-]+")(?![\w`])', r"`\1`", text)
    parts = re.split(r"`([^`]+)`", text)  # those with an odd index were in backticks
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"[\\|*]|(?<=\w)_(?!\w)", r"\\\g<0>", part)
            continue
        code = " ".join(part.split())
        public = code.split(".")[0] in ntkbook.__all__  # also where another module's docstring names it
        target = f"{code} <ntkbook.{code}>" if public else code
        parts[i] = f":py:obj:`{target}`" if NAME.fullmatch(code) else f"``{code}``"
        if re.match(r"\w", parts[i + 1]):  # as in the plural of a name
            parts[i] += "\\ "
    return "".join(parts)


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = restructured(lines)


def signature(owner: str, text: str) -> str:
    """A signature or its result's type, with the types of this package under the names that the reference has.

    Those are the names of `ntkbook` itself; types of its inside are no links. A method that gives its own type says so
    by a type variable.
    """
    # Not "device" and "dtype", which would be linked to properties of these names.
    text = re.sub(r"~(?!ntkbook\b|torch\.d(?:evice|type)\b)[\w.]+\.(?=\w)", "", text)
    text = re.sub(r"~?ntkbook\.\w+\.Own\b", owner.rpartition(".")[0], text)
    return re.sub(r"~?ntkbook\.(?!likelihoods\b|operators\b)[a-z_]+\.(?=\w)", "", text)


def _process_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, arguments: str | None, result: str | None
) -> tuple[str | None, str | None]:
    return arguments and signature(name, arguments), result and signature(name, result)


def parameters_apart(body: str) -> str:
    """A page's HTML with the parameters of long signatures as boxes: Sphinx makes lists of them that define nothing."""
    return _PARAMETERS.sub(lambda found: f'<div class="sig-params">\n{_as_boxes(found[1])}</div>', body)


def _as_boxes(entries: str) -> str:
    return entries.replace("<dd>", "<div>").replace("</dd>", "</div>")


def _dress(app: Any, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if "body" in context:
        context["body"] = parameters_apart(context["body"])


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """The fields of a NamedTuple, whose docstring is "Alias for field number 0": its own says what they are."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("autodoc-skip-member", _skip)
    app.connect("html-page-context", _dress)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
