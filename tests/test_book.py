"""The real book: quick runs on the embedded data, repeated strictly; the stored notebooks; the rendered pages."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib
import pytest
from bs4 import BeautifulSoup
from exercises import snippets
from nbformat.v4 import new_code_cell

from ntkbook.publish import claims, notebooks, rendering, runner, scorecard, site

ROOT = Path(__file__).parents[1]
CHAPTERS = runner.chapters(ROOT)
STORED = {name: ROOT / "book" / f"{name}.ipynb" for name in CHAPTERS}
MARK = "nbval-ignore-output"


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """The root of a copy of the book with a quick run of every chapter, offline and without real data."""
    folder = tmp_path_factory.mktemp("quick")
    root = folder / "book"
    shutil.copytree(ROOT / "book", root / "book")
    shutil.copytree(ROOT / "profiles", root / "profiles")
    for name in ("_toc.yml", "_config.yml", "requirements.lock"):
        shutil.copyfile(ROOT / name, root / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NTKBOOK_OFFLINE", "1")
        patch.delenv("NTKBOOK_DATA", raising=False)
        patch.setenv("MPLCONFIGDIR", matplotlib.get_configdir())  # keep the font cache while the data cache is hidden
        patch.setenv("XDG_CACHE_HOME", str(folder / "no-cache"))
        results = runner.run(root, profile="quick", progress=False)
        yield root, {result.chapter: result for result in results}


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_quick_run_succeeds_without_verdicts(quick, name, capsys):
    _, results = quick
    result = results[name]
    assert result.status == "done", result.error
    assert scorecard.check(result.notebook) == []
    records = claims.collect(result.notebook)
    assert {record.verdict for record in records.values()} <= {"not evaluated"}
    assert set(records) == {claim.id for claim in claims.CLAIMS if claim.chapter == name}
    nb = notebooks.read(result.notebook)
    assert not [o for cell in nb.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]
    with capsys.disabled():
        print(f"\n  {result.line}", end="")


def test_quick_runs_repeat_exactly_and_the_exercises_snippets_hold_after_them(quick, capsys):
    _, results = quick
    paths = [result.notebook for result in results.values()]
    done = nbval([followed_by(path, snippets(name)) for name, path in zip(results, paths)])
    assert done.returncode == 0, done.stdout[-5000:]
    ignored = [
        f"{path.parts[-3]}: {cell.source.strip().splitlines()[0]}"
        for path in paths
        for cell in notebooks.read(path).cells
        if MARK in cell.metadata.get("tags", []) or "NBVAL_IGNORE_OUTPUT" in cell.source
    ]
    with capsys.disabled():
        print(f"\n  nbval compared every output; {len(ignored)} cells were run but not compared: {ignored}", end="")


def followed_by(path, code):
    """A copy of a notebook, beside it, with further cells, whose outputs are not compared."""
    nb = notebooks.read(path)
    nb.cells += [new_code_cell(cell, metadata={"tags": [MARK]}) for cell in code]
    longer = path.with_name("longer.ipynb")
    notebooks.write(nb, longer)
    return longer


def test_a_changed_number_and_a_wrong_snippet_are_seen_by_the_repetition(quick):
    root, results = quick
    fastest = min(results.values(), key=lambda result: result.seconds)
    nb = notebooks.read(fastest.notebook)
    (output, kind) = next(
        (o, k) for cell in nb.cells for o in cell.get("outputs", []) for k, v in o.get("data", {}).items()
        if isinstance(v, str) and re.search(r"\d\.\d", v)
    )  # fmt: skip
    text = output["data"][kind]
    output["data"][kind] = re.sub(r"(\d\.)(\d)", lambda m: m[1] + str((int(m[2]) + 1) % 10), text, count=1)
    changed = root / "runs" / fastest.chapter / "changed.ipynb"
    notebooks.write(nb, changed)
    done = nbval([followed_by(changed, ["assert profile != 'quick'"])])
    assert done.returncode == 1
    assert "mismatch" in done.stdout
    assert "AssertionError" in done.stdout


def nbval(paths):
    """Run every code cell again and compare all outputs with the stored ones."""
    command = [sys.executable, "-m", "pytest", "--nbval", "-q", "--color=no", "-p", "no:cacheprovider"]
    return subprocess.run([*command, "-c", os.devnull, *map(str, paths)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_stored_notebook_is_its_chapter_executed_in_order(name):
    nb, bare = notebooks.read(STORED[name]), notebooks.from_text(ROOT / "book" / f"{name}.md")
    assert [cell.source for cell in nb.cells] == [cell.source for cell in bare.cells], f"run `ntkbook store {name}`"
    assert [cell.id for cell in nb.cells] == [cell.id for cell in bare.cells]
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not [cell for cell in nb.cells if {"papermill", "execution"} & set(cell.metadata)]
    assert STORED[name].stat().st_size < 2_000_000
    assert not re.search(r"0x[0-9a-f]{9,}|/home/|/Users/|/tmp/", STORED[name].read_text("utf8"))


@pytest.mark.parametrize("name", CHAPTERS)
def test_stored_claims_follow_from_their_numbers(name):
    assert scorecard.check(STORED[name]) == []
    records = claims.collect(STORED[name])
    assert set(records) == {claim.id for claim in claims.CLAIMS if claim.chapter == name}
    assert all(record.profile != "quick" for record in records.values())


def test_the_stored_scorecard_is_that_of_the_stored_chapters():
    assert scorecard_is_current(ROOT), "run `ntkbook store 07`"


def test_a_changed_claim_is_seen_in_a_copy(tmp_path):
    """The claim's own check sees a stored number or verdict that is another.

    The scorecard follows the number; the verdict it makes itself, by the present criterion, so that it stays as it was.
    """
    chapter = next(entry["chapter"] for entry in scorecard.entries(ROOT) if entry["value"])
    for field in ("value", "verdict"):
        book = Path(shutil.copytree(ROOT / "book", tmp_path / field / "book"))
        nb = notebooks.read(book / f"{chapter}.ipynb")
        stored = next(
            o for cell in nb.cells for o in cell.get("outputs", [])
            if o.get("metadata", {}).get("scrapbook", {}).get("name", "").endswith("-record")
            and json.loads(o["data"][claims.MIME_PREFIX + "text/plain"])["value"] is not None
        )  # fmt: skip
        record = json.loads(stored["data"][claims.MIME_PREFIX + "text/plain"])
        record[field] = record["value"] + 0.5 if field == "value" else f"not {record['verdict']}"
        stored["data"][claims.MIME_PREFIX + "text/plain"] = json.dumps(record)
        notebooks.write(nb, book / f"{chapter}.ipynb")
        assert scorecard.check(book / f"{chapter}.ipynb")
        assert scorecard_is_current(book.parent) == (field == "verdict")


def scorecard_is_current(root):
    found = scorecard.entries(root)
    shown = [o["data"] for o in claims.outputs(root / "book" / "07_scorecard.ipynb")]
    both = {"text/html": rendering.as_html(found), "text/plain": scorecard.as_text(found)}
    return both in [{kind: "".join(text) for kind, text in data.items()} for data in shown]


@pytest.fixture(scope="module", params=["stored", "quick"])
def pages(request):
    """The rendered book: as `make html` makes it from the stored notebooks, and as `make book` from quick runs."""
    if request.param == "quick":
        root, results = request.getfixturevalue("quick")
        return site.build(root, site.stage(root, list(results.values()))).parent
    return request.getfixturevalue("stored_site")


@pytest.fixture(scope="module")
def parsed(pages):
    """Every page, parsed; templates that the theme leaves in _static are none."""
    files = [path for path in pages.rglob("*.html") if "_static" not in path.parts]
    return {path: BeautifulSoup(path.read_text("utf8"), "html.parser") for path in files}


def test_every_internal_link_leads_to_a_file_and_an_anchor(parsed):
    anchors = {path: {tag.get("id") or tag.get("name") for tag in page.select("[id], a[name]")}
               for path, page in parsed.items()}  # fmt: skip
    links = {(path, urlsplit(tag.get("href") or tag.get("src") or "")) for path, page in parsed.items()
             for tag in page.select("[href], [src]")}  # fmt: skip
    internal = [(path, link) for path, link in links if not (link.scheme or link.netloc)]
    assert sum(bool(link.fragment) for _, link in internal) > 200
    for path, link in internal:
        target = Path(os.path.normpath(path.parent / unquote(link.path))) if link.path else path
        assert target.is_file(), f"{path.name}: {link.geturl()}"
        assert not link.fragment or unquote(link.fragment) in anchors[target], f"{path.name}: {link.geturl()}"


def test_the_rendered_book_asks_nothing_of_the_network(pages):
    files = list(pages.rglob("*.html"))
    assert len(files) > len(CHAPTERS)
    for path in files:
        tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", path.read_text("utf8"))
        away = [tag for tag in tags if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag)]
        assert not [tag for tag in away if 'rel="canonical"' not in tag], path.name
    for path in (pages / "_static").rglob("*.css"):
        assert not re.search(r"""(?:@import|url\()\s*["'(]?\s*(?:https?:)?//""", path.read_text("utf8")), path.name


def test_the_rendered_book_has_what_it_needs(pages):
    static = pages / "_static"
    assert (static / "plotly.min.js").stat().st_size > 1_000_000
    assert (static / "mathjax" / "tex-chtml.js").exists()
    assert (pages / "searchindex.js").exists()
    index = (pages / "book" / "index.html").read_text("utf8")
    assert all(f'href="{name}.html"' in index for name in CHAPTERS)
    table = (pages / "book" / "07_scorecard.html").read_text("utf8")
    assert table.count('data-label="claim"') == len(claims.CLAIMS)
    assert "mathjax/tex-chtml.js" in (pages / "book" / f"{CHAPTERS[0]}.html").read_text("utf8")


def test_every_chapter_can_be_launched_and_downloaded(pages):
    for name in CHAPTERS:
        text = (pages / "book" / f"{name}.html").read_text("utf8")
        (binder,) = re.findall(r'href="https://mybinder\.org/v2/gh/([^"]*)"', text)
        (colab,) = re.findall(r'href="https://colab\.research\.google\.com/github/([^"]*)"', text)
        for place in (binder.partition("?urlpath=lab/tree/")[2], colab.partition("/blob/main/")[2]):
            assert (ROOT / place).is_file(), place
        for suffix in (".ipynb", ".md"):
            assert f'href="../_sources/book/{name}{suffix}"' in text
            assert (pages / "_sources" / "book" / f"{name}{suffix}").read_text("utf8")
    for name in ("index", "data", "cite"):
        assert f'href="../_sources/book/{name}.md"' in (pages / "book" / f"{name}.html").read_text("utf8")


def test_every_page_has_a_card(pages):
    files = [pages / "index.html", *(pages / "book").glob("*.html")]
    assert len(files) >= len(CHAPTERS) + 4
    for path in files:
        text = path.read_text("utf8")
        tags = dict(re.findall(r'<meta (?:property|name)="((?:og:|twitter:|desc)[^"]*)" content="([^"]*)">', text))
        assert {"og:title", "og:description", "og:url", "og:image", "og:image:alt", "description"} <= set(tags), path
        assert all(tags.values())
        assert len(html.unescape(tags["description"])) <= 202
        assert tags["twitter:card"] == "summary_large_image"
        base, card, _ = tags["og:image"].partition("_static/card.png")
        assert tags["og:url"].startswith(base)
        assert (pages / tags["og:url"].removeprefix(base)).is_file()
        assert (pages / card).is_file()


def test_every_claim_links_to_the_row_that_its_chapter_shows(parsed):
    parsed = {path.name: page for path, page in parsed.items() if path.parent.name == "book"}
    links = [cell.a["href"] for cell in parsed["07_scorecard.html"].select('td[data-label="claim"]')]
    assert len(links) == len(claims.CLAIMS)
    for link in links:
        name, _, anchor = link.partition("#")
        assert parsed[name].select_one(f"table.claims#{anchor} .verdict"), link
    for name in CHAPTERS[:-1]:
        (line,) = parsed[f"{name}.html"].select("p.outcome")
        page, _, anchor = line.select("a")[-1]["href"].partition("#")
        assert page == "status.html"
        assert parsed[page].find(id=anchor), anchor
        if any(claim.chapter == name for claim in claims.CLAIMS):
            assert re.match(r"\d+ (of \d+ claims are reproduced|claims, not evaluated)", line.get_text())


def test_every_figure_is_described_in_words(parsed):
    for path, page in parsed.items():
        images = page.select("article img")
        assert not [image["src"] for image in images if len(image.get("alt", "").split()) < 6], path.name
        texts = [image["alt"] for image in images if not image["src"].startswith("data:")]
        assert len(texts) == len(set(texts)), f"{path.name}: two figures with the same words"
        assert len(texts) >= 3 or path.stem not in CHAPTERS[:-1]


def test_a_warning_fails_the_build(toybook, tmp_path):
    root = Path(shutil.copytree(toybook, tmp_path / "toy"))
    assert site.build(root).exists()
    index = root / "book" / "index.md"
    index.write_text(index.read_text("utf8") + "\nSee [nothing](nothing.md).\n", "utf8")
    with pytest.raises(site.BuildError, match="nothing"):
        site.build(root)


def test_the_reference_has_every_public_name_and_every_reference_to_one_resolves(pages, parsed):
    import ntkbook

    unlisted = {"ntkbook.blocks", "ntkbook.choice.KeptGram", "ntkbook.layers"}  # inside, but worth a word
    for path, page in parsed.items():
        for code in page.select("code.xref.py"):
            name = code.get_text().strip("()")
            if name.split(".")[0] in ("ntkbook", *ntkbook.__all__) and name not in unlisted:
                assert code.find_parent("a"), f"{path.name}: {name} leads nowhere"
    reference = parsed[pages / "book" / "api.html"]
    documented = {entry["id"] for entry in reference.select("dt.sig[id]")}
    assert {f"ntkbook.{name}" for name in ntkbook.__all__} <= documented
    assert {"ntkbook.NTKGP.to", "ntkbook.Posterior.mean", "ntkbook.likelihoods.Poisson"} <= documented
    signature = reference.find(id="ntkbook.Linearization.vjp").get_text()
    assert 'Float[Tensor, "p k"]' in signature.replace("'", '"')


def test_a_reference_to_a_name_that_is_not_there_fails_the_build(toybook, tmp_path):
    root = Path(shutil.copytree(toybook, tmp_path / "toy"))
    index = root / "book" / "index.md"
    index.write_text(index.read_text("utf8") + "\nSee {py:func}`ntkbook.nothing` and {py:func}`torch.add`.\n", "utf8")
    with pytest.raises(site.BuildError, match=r"ntkbook\.nothing") as error:
        site.build(root)
    assert "torch.add" not in str(error.value)
