"""How to cite the paper, the book and its data: BibTeX and a list, from what the project already says of each."""

import re
from collections.abc import Iterable
from pathlib import Path

import yaml

PAPER = ("maddox2019", "maddox2021")
DATA = {  # entry of references.bib for each data set that has a publication of its own
    "sinusoids": "kim2018", "precipitation": "menne2012", "malaria": "bhatt2015", "mnist": "lecun1998",
    "kmnist": "clanuwat2018", "fashionmnist": "xiao2017", "digits": "alpaydin1998", "cifar10": "krizhevsky2009",
}  # fmt: skip
_SECTION = re.compile(r"(<!-- cite (\w+): made by `ntkbook cite --write` -->\n).*?(<!-- /cite -->)", re.DOTALL)
_LINKS = {
    r"doi:(10\.\S+)": r"[doi:\1](https://doi.org/\1)",
    r"arXiv:(\d+\.\d+)": r"[arXiv:\1](https://arxiv.org/abs/\1)",
}


def entries(bibliography: Path) -> dict[str, str]:
    """The entries of a BibTeX file by key, each as it stands there."""
    found = re.split(r"^(?=@)", bibliography.read_text("utf8"), flags=re.MULTILINE)
    keys = [re.match(r"@\w+\{([^,]+),", entry) for entry in found]
    return {key.group(1): entry.strip() for key, entry in zip(keys, found, strict=True) if key}


def book_entry(citation: Path) -> str:
    """BibTeX for the book, from its CITATION.cff."""
    facts = yaml.safe_load(citation.read_text("utf8"))
    names = " and ".join(f"{{{person['name']}}}" for person in facts["authors"])
    lines = {"title": f"{{{facts['title']}}}", "author": names, "version": facts["version"]}
    lines |= {"url": facts["repository-code"], "license": facts["license"]}
    return "@software{ntkbook,\n" + "".join(f"  {key} = {{{value}}},\n" for key, value in lines.items()) + "}"


def data_list() -> str:
    """Data set, licence and whom to cite, as Markdown, from the registry that chapters take their data from."""
    from ntkbook.experiments.data.registry import REGISTRY

    lines = []
    for entry in REGISTRY.values():
        cite = "Nobody to cite: made up for this book" if entry.citation.startswith("none") else entry.citation
        lines.append(f"- **{entry.title[0].upper()}{entry.title[1:]}.** *{entry.licence}.* {linked(cite)}.")
    return "\n".join(lines)


def linked(citation: str) -> str:
    """A citation in Markdown with its DOI and arXiv's number as links."""
    for plain, link in _LINKS.items():
        citation = re.sub(plain, link, citation)
    return citation


def sections(root: Path) -> dict[str, str]:
    """What the page shows of the paper, the book and the data, as Markdown."""
    known = entries(root / "book" / "references.bib")
    return {
        "paper": _bibtex(known[key] for key in PAPER),
        "book": _bibtex([book_entry(root / "CITATION.cff")]),
        "data": f"{data_list()}\n\n{_bibtex(known[key] for key in DATA.values())}",
    }


def with_sections(page: str, made: dict[str, str]) -> str:
    """A page with these sections between its markers; ValueError unless it has a place for each."""
    names = [found.group(2) for found in _SECTION.finditer(page)]
    if names != list(made):
        raise ValueError(f"expected a page with places for {', '.join(made)}, got {', '.join(names) or 'none'}")
    return _SECTION.sub(lambda found: f"{found.group(1)}\n{made[found.group(2)]}\n\n{found.group(3)}", page)


def write(root: Path) -> Path:
    """Bring ``book/cite.md`` up to date, and return where it is."""
    path = root / "book" / "cite.md"
    path.write_text(with_sections(path.read_text("utf8"), sections(root)), "utf8")
    return path


def _bibtex(found: Iterable[str]) -> str:
    return "```bibtex\n" + "\n\n".join(found) + "\n```"
