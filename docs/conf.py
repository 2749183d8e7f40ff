"""The documentation site: ``make docs``."""

import sys
import warnings
from pathlib import Path

from sphinx_gallery.sorting import ExplicitOrder

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "Locality Landscapes"
author = "The Locality Landscapes authors"
project_copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "docstrings",
    "layout",
    "mathml",
    "offline",
    "pictures",
    "places",
]
default_role = "py:obj"
exclude_patterns = ["_build"]
templates_path = ["_templates"]
suppress_warnings = ["config.cache"]  # the order of the gallery is an object

# -- pages -----------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "Locality Landscapes"
html_static_path = ["_static"]
html_css_files = ["widths.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"

# -- the reference ---------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "inherited-members": "Mapping,Generic,Module,Protocol,TrainerCallback,Callback,BaseException",
}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_rtype = False
add_module_names = False

# -- the gallery -----------------------------------------------------------------------------------

ORDER = """
    first_spectrum huggingface density_with_errors per_layer is_it_flat pitfalls trajectory
    mode_connectivity class_outliers edge_of_stability resume checks
""".split()

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "within_subsection_order": ExplicitOrder([f"plot_{name}.py" for name in ORDER]),
    "doc_module": ("lossgeometry",),
    "backreferences_dir": "gallery/of",
    "capture_repr": (),
    "inspect_global_variables": False,
    "remove_config_comments": True,
    "show_signature": False,
    "download_all_examples": False,
    "abort_on_example_error": True,
    "write_computation_times": False,
}

# Agg draws, and shows nothing.
warnings.filterwarnings("ignore", message=".*cannot show the figure.*")
