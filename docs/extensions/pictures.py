"""A picture is a link to its file: on a telephone, that is how to see it at its full size."""

from pathlib import PurePosixPath
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.osutil import relative_uri
from sphinx_gallery.directives import imgsgnode


def link(app: Sphinx, document: nodes.document, page: str) -> None:
    """Put a link around each picture, but for the thumbnails, which lead to an example."""
    here = app.builder.get_target_uri(page)
    for picture in [*document.findall(nodes.image), *document.findall(imgsgnode)]:
        source = picture["uri"]
        if "thumb" in PurePosixPath(source).parts or isinstance(picture.parent, nodes.reference):
            continue
        name = app.env.images[source][1] if source in app.env.images else PurePosixPath(source).name
        address = relative_uri(here, f"{app.builder.imagedir}/{name}")
        around = nodes.reference("", "", picture.deepcopy(), internal=True, refuri=address)
        block = isinstance(picture, imgsgnode)
        picture.replace_self(nodes.paragraph("", "", around) if block else around)


def setup(app: Sphinx) -> dict[str, Any]:
    """Link once the names of the files are known."""
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
