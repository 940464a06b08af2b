"""The site that `make docs` builds: pages in Markdown, and the reference from the docstrings.

Sphinx, because it renders the mathematics, the sections and the cross-references of the docstrings as they are written.
"""

from typing import Any

import jaxoptim

project = "jaxoptim"
author = "The authors of jaxoptim"
release = version = jaxoptim.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
extensions += ["sphinx-mathjax-offline"]  # MathJax in the site itself, which needs no network then
exclude_patterns = []
nitpicky = True
# Functions, classes and types of other libraries, and the objects behind the public names, have no page here.
nitpick_ignore_regex = [("py:.*", r"(?!jaxoptim\.).*|.*Storage|.*\.Numeric|jaxoptim\.rules\.sgmcmc\.SGMCMC")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

HOOKS = "decays fixed may_lack specs starts_at_once step_type storage_class unlisted"  # between modules of the library
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": HOOKS.replace(" ", ",")}
autodoc_inherit_docstrings = False
autodoc_typehints = "none"
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
# The house writes these as prose; the fields that Napoleon makes of them would break at every line and colon.
napoleon_custom_sections = ["Raises", "Returns", "Slots", "State", "Memory", "Differences from devinterp"]

html_theme = "furo"
html_title = f"jaxoptim {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False


def is_field(app: Any, kind: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of a named tuple, which its ``Attributes:`` has."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Any) -> None:
    """Connect what Sphinx asks."""
    app.connect("autodoc-skip-member", is_field)
