"""How to cite: from the bibliography, CITATION.cff and the registry of data, which must agree."""

import re
from pathlib import Path

import pytest
import yaml

from ntkbook.experiments.data.registry import REGISTRY
from ntkbook.publish import citing

ROOT = Path(__file__).parents[1]
ENTRIES = citing.entries(ROOT / "book" / "references.bib")


def test_entries_are_whole():
    text = (ROOT / "book" / "references.bib").read_text("utf8")
    assert len(ENTRIES) == len(re.findall(r"^@", text, re.MULTILINE))
    assert all(entry.count("{") == entry.count("}") for entry in ENTRIES.values())


@pytest.mark.parametrize("name", citing.DATA)
def test_bibtex_and_registry_cite_the_same(name):
    entry, citation = ENTRIES[citing.DATA[name]], REGISTRY[name].citation
    (year,) = re.findall(r"year = {(\d{4})}", entry)
    (authors,) = re.findall(r"author = {(.*)},", entry)
    assert f"({year})" in citation
    assert citation.startswith(authors.partition(",")[0])
    (title,) = re.findall(r" title = {(.*)},", entry)
    assert re.sub(r"\W|\\emph", "", title).lower() in re.sub(r"\W", "", citation).lower()


def test_every_data_set_with_a_publication_has_bibtex():
    for name, entry in REGISTRY.items():
        same = [other for other in citing.DATA if REGISTRY[other].citation == entry.citation]
        published = re.search(r"doi:|arXiv:|NeurIPS|Technical report", entry.citation)
        assert bool(published) == bool(same), name


def test_every_data_set_is_listed_with_its_licence():
    lines = citing.data_list().splitlines()
    assert len(lines) == len(REGISTRY)
    for line, entry in zip(lines, REGISTRY.values(), strict=True):
        assert line.lower().startswith(f"- **{entry.title.lower()}.** *{entry.licence.lower()}.* ")
    assert sum("](https://doi.org/" in line for line in lines) == sum("doi:" in e.citation for e in REGISTRY.values())
    assert sum("](https://arxiv.org/abs/" in line for line in lines) == 2


def test_the_books_entry_is_that_of_its_citation_file():
    facts = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    entry = citing.book_entry(ROOT / "CITATION.cff")
    for key in ("title", "version", "license", "repository-code"):
        assert facts[key] in entry


def test_a_page_needs_a_place_for_each_section():
    page = "a\n<!-- cite x: made by `ntkbook cite --write` -->\nold\n<!-- /cite -->\nb\n"
    once = citing.with_sections(page, {"x": "new"})
    assert "old" not in once
    assert "\nnew\n" in once
    assert citing.with_sections(once, {"x": "new"}) == once
    with pytest.raises(ValueError, match="places for x, y, got x"):
        citing.with_sections(page, {"x": "new", "y": "new"})
