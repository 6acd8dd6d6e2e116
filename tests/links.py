"""The internal links of rendered pages."""

import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

_TAG = re.compile(r"<(?!script\b)\w+\s[^>]*>")
_ATTRIBUTE = re.compile(r"""\b(href|src|id|name)=["']([^"']*)["']""")


def broken(site: Path) -> list[str]:
    """Links of a built site's pages whose file or anchor is not there, as "page: link"."""
    anchors, links = {}, []
    for page in site.rglob("*.html"):
        text = re.sub(r"(?s)<script\b.*?</script>", "", page.read_text("utf8"))
        found = [pair for tag in _TAG.findall(text) for pair in _ATTRIBUTE.findall(tag)]
        anchors[page.resolve()] = {unescape(value) for key, value in found if key in ("id", "name")}
        links += [(page, unescape(value)) for key, value in found if key in ("href", "src")]
    missing = []
    for page, link in links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or not link:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page.resolve()
        there = target.is_file() and (not parts.fragment or unquote(parts.fragment) in anchors.get(target, ()))
        if not there:
            missing.append(f"{page.relative_to(site)}: {link}")
    return missing
