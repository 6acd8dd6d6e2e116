"""A Sphinx extension for what every page of the book carries: social-card metadata, its date, its downloads.

The repository's address stands in one place that is read, ``repository: url`` of ``_config.yml``; where the pages lie
follows from it (a test compares all other mentions).
"""

import html
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from docutils import nodes

CARD = "_static/card.png"
CARD_SIZE = (1200, 630)
CARD_ALT = "A network's tangent kernel, conditioned on points of a new sinusoid: mean and 95 % band, beside an RBF's"
ICON = '<link rel="icon" href="data:,">'  # none: without a word about it, browsers ask the server
# The theme asks for the mode that is stored, finds none on a first visit, and says so as an error.
FIRST_VISIT = '<script>localStorage.getItem("mode") || localStorage.setItem("mode", "auto")</script>'
_META = re.compile(r'<meta (?:property="og:|name="twitter:|name="description")[^>]*>')


def pages_url(repository: str) -> str:
    """Where GitHub Pages shows a repository's pages, with a final slash; ValueError unless it is on GitHub."""
    parts = urlsplit(repository)
    path = parts.path.strip("/").split("/")
    if parts.netloc != "github.com" or len(path) != 2:
        raise ValueError(f"expected https://github.com/OWNER/NAME as repository url in _config.yml, got {repository!r}")
    owner, name = path
    return f"https://{owner.lower()}.github.io/{name}/"


def description(doctree: nodes.document | None, longest: int = 200) -> str:
    """A page's first paragraph of its own as plain text, cut at a word where it is longer; empty without one."""
    paragraphs = doctree.findall(nodes.paragraph) if doctree is not None else ()
    first = next((paragraph for paragraph in paragraphs if "outcome" not in paragraph["classes"]), None)
    text = " ".join(first.astext().split()).removeprefix("Question. ") if first is not None else ""
    return text if len(text) <= longest else f"{text[:longest].rpartition(' ')[0]} …"


def last_change(folder: Path, files: list[Path]) -> str | None:
    """The day of the last commit to any of the files, as YYYY-MM-DD.

    None where that cannot be known: outside git, in a shallow clone, for files that git does not have.
    """
    try:
        shallow = git(folder, "rev-parse", "--is-shallow-repository")
        told = git(folder, "log", "-1", "--format=%cs", "--", *map(str, files)) if shallow == "false" else ""
    except (OSError, subprocess.CalledProcessError):
        return None
    return told or None


def metadata(title: str, text: str, url: str, card: str, site: str) -> str:
    """The tags from which other sites make a card of a page: Open Graph's, which most read, and Twitter's.

    Args:
        title: the page's.
        text: one sentence or two.
        url, card: absolute addresses of the page and the picture.
        site: the book's title.
    """
    width, height = CARD_SIZE
    properties = {
        "og:type": "article", "og:site_name": site, "og:title": title, "og:description": text, "og:url": url,
        "og:image": card, "og:image:width": width, "og:image:height": height, "og:image:alt": CARD_ALT,
    }  # fmt: skip
    names = {"description": text, "twitter:card": "summary_large_image", "twitter:image:alt": CARD_ALT}
    tags = [("property", key, value) for key, value in properties.items()]
    tags += [("name", key, value) for key, value in names.items()]
    return "\n".join(f'<meta {kind}="{key}" content="{html.escape(str(value))}">' for kind, key, value in tags)


def dress_front_door(out: Path, first: str) -> None:
    """Give the page that only leads to the first one that page's card and title, for it is the address people share."""
    page = (out / f"{first}.html").read_text("utf8")
    (title,) = re.findall(r'<meta property="og:title" content="([^"]*)">', page)
    tags = "\n".join(_META.findall(page))
    (out / "index.html").write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n{tags}\n{ICON}\n'
        f'<meta http-equiv="Refresh" content="0; url={first}.html">\n</head>\n'
        f'<body><a href="{first}.html">{title}</a></body>\n</html>\n',
        "utf8",
    )


def setup(app: Any) -> dict[str, Any]:
    """Sphinx's entry point."""
    app.connect("config-inited", _set_address)
    app.connect("html-page-context", _dress, priority=900)  # after the theme has made its buttons
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _set_address(app: Any, config: Any) -> None:
    config.html_baseurl = config.html_baseurl or pages_url(config.html_theme_options.get("repository_url", ""))


def _dress(app: Any, name: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    base, site = app.config.html_baseurl, app.config.html_title
    title = re.sub(r"<[^>]*>", "", html.unescape(context.get("title", ""))) or site
    text = description(doctree) or site
    tags = metadata(title, text, f"{base}{name}.html", f"{base}{CARD}", site)
    context["metatags"] = f"{context.get('metatags', '')}\n{tags}\n{ICON}\n{FIRST_VISIT}\n"
    # jupyter-book brings thebe, which no button here starts: its settings come twice, a second one is an error.
    context["script_files"] = [file for file in context["script_files"] if "thebe" not in str(file)]
    sources = [path for suffix in (".md", ".ipynb") if (path := Path(app.srcdir, name + suffix)).exists()]
    context["last_updated"] = last_change(Path(app.srcdir), sources) if sources else None
    if len(sources) == 2:
        _add_text_download(app, name, sources[0], context)


def _add_text_download(app: Any, name: str, text: Path, context: dict[str, Any]) -> None:
    """Beside the notebook, the text that it is made from."""
    copy = Path(app.outdir, "_sources", f"{name}.md")
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(text, copy)
    url = f"{context['pathto']('_sources', 1)}/{name}.md"
    button = {"type": "link", "url": url, "text": ".md", "icon": "fas fa-file", "label": "download-text-button"}
    button["tooltip"] = "Download the chapter's text"
    for group in context.get("header_buttons", []):
        if group.get("label") == "download-buttons":
            group["buttons"].insert(1, button)


def git(folder: Path, *arguments: str) -> str:
    """What a git command says in a folder; OSError or CalledProcessError where it cannot be asked."""
    told = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return told.stdout.strip()
