"""Links between the built pages lead somewhere, and nothing on them is fetched from elsewhere."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

logger = getLogger(__name__)
FETCHED = {"script", "img", "link", "iframe", "source", "video", "audio"}


class Page(HTMLParser):
    """What a page names, links to and fetches."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.names: set[str] = {"", "top"}
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the names and addresses of an element."""
        for key, value in attrs:
            if key in ("id", "name") and value:
                self.names.add(value)
            if key in ("href", "src") and value:
                self.links.add(value)
                if tag in FETCHED:
                    self.fetched.add(value)


def check(app: Sphinx, error: Exception | None) -> None:
    """Warn of what is broken, which is an error where warnings are."""
    if error is not None or app.builder.format != "html":
        return
    root = Path(app.outdir)
    pages = {path: Page(path) for path in root.rglob("*.html")}
    for path, page in pages.items():
        place = path.relative_to(root)
        for address in sorted(page.fetched):
            if urlsplit(address).netloc:
                logger.warning(f"{place}: it fetches {address} from elsewhere")
        for address in sorted(page.links):
            target, name = urldefrag(address)
            if urlsplit(address).scheme or urlsplit(address).netloc:
                continue
            end = (path.parent / unquote(urlsplit(target).path)).resolve() if target else path
            if not end.exists():
                logger.warning(f"{place}: nothing is at {address}")
            elif name and end in pages and unquote(name) not in pages[end].names:
                logger.warning(f"{place}: no {name} at {address}")


def setup(app: Sphinx) -> dict[str, Any]:
    """Check once all pages have been written."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
