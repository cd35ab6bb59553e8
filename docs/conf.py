"""Sphinx configuration; ``make docs`` builds the pages and takes every warning for an error."""

from importlib import metadata

project = "hvpspec"
author = "The hvpspec developers"
copyright = "2026, The hvpspec developers"
release = metadata.version("hvpspec")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "results"]

html_theme = "furo"
html_title = f"hvpspec {release}"
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# A name in single backticks in a docstring is that of a Python object.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Reference"]
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
