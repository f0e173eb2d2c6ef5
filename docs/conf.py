"""Sphinx configuration. Nothing is executed here: notebooks show the outputs they were saved with."""

import shutil
from pathlib import Path

import dyntune

project = "dyntune"
author = "The dyntune contributors"
copyright = author  # noqa: A001 - Sphinx's name
version = release = dyntune.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"dyntune {release}"

nb_execution_mode = "off"  # `make test-full` executes them
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False

# Sphinx reads only below its own folder, and the notebooks live outside: a copy and a list of them, kept out of git.
_source = Path(__file__).parents[1] / "notebooks"
_copy = Path(__file__).parent / "notebooks"
_notebooks = sorted(_source.glob("*.ipynb"))
shutil.rmtree(_copy, ignore_errors=True)
_copy.mkdir()
for _notebook in _notebooks:
    shutil.copy(_notebook, _copy)
_entries = "\n".join(notebook.stem for notebook in _notebooks)
(_copy / "index.md").write_text(f"# Notebooks\n\n```{{toctree}}\n:maxdepth: 1\n\n{_entries}\n```\n")
