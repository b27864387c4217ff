"""The documentation site: ``pip install -e ".[docs]" && sphinx-build -W docs build/site``."""

import inspect
import os
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from docutils import nodes  # noqa: E402

import effjax  # noqa: E402

project, author, release = "effjax", "the effjax authors", effjax.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb", "sphinx_copybutton"]
html_math_renderer = "mathml"  # browsers draw it without scripts and without a network
html_theme = "furo"
html_static_path, html_css_files = ["static"], ["site.css"]
html_title = f"effjax {release}"
exclude_patterns = ["pictures"]
nb_execution_mode = "off"  # notebooks run in the tests
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # Args says shapes and dtypes
autodoc_default_options = {"members": False}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = napoleon_use_ivar = napoleon_attr_annotations = False
copybutton_prompt_text = ">>> "
copybutton_exclude = ".linenos, .gp, .go"
suppress_warnings = ["myst.header"]  # a docstring's or a card's headings begin where its page stands

# Where files of the repository stand in the site.
PLACES = {
    r"README\.md": "_pages/start.md",
    r"configs/launch/README\.md": "_pages/launch.md",
    r"configs/(\w+)/README\.md": r"_pages/methods/\1.md",
    r"notebooks/(\w+\.ipynb)": r"_pages/notebooks/\1",
    r"docs/(\w+\.md)": r"\1",
}
NAMESPACES = (
    "optim",
    "finetune",
    "transformers",
    "recurrent",
    "graph",
    "hardness",
    "vision",
    "models",
    "data",
    "tasks",
    "train",
)


def write_pages() -> None:
    """API pages from the stubs, pages of methods from the cards, the notebooks: all below ``_pages``."""
    pages = HERE / "_pages"
    shutil.rmtree(pages, ignore_errors=True)
    for folder in ("api", "methods", "notebooks"):
        (pages / folder).mkdir(parents=True)
    for namespace in ("", *NAMESPACES):
        name = f"effjax.{namespace}".rstrip(".")
        (pages / "api" / f"{namespace or 'effjax'}.md").write_text(api_page(name))
    for stem in effjax.METHODS:
        card = (ROOT / "configs" / stem / "README.md").read_text()
        (pages / "methods" / f"{stem}.md").write_text(moved(card, ROOT / "configs" / stem, pages / "methods"))
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, pages / "notebooks")
    (pages / "start.md").write_text(moved((ROOT / "README.md").read_text(), ROOT, pages))
    launch = ROOT / "configs" / "launch"
    (pages / "launch.md").write_text(moved((launch / "README.md").read_text(), launch, pages))


def api_page(name: str) -> str:
    """A reference of one namespace: a directive per public function and class."""
    space = effjax if name == "effjax" else getattr(effjax, name.partition(".")[2])
    parts = [f"# {name}\n"]
    for public in sorted(space.__all__, key=str.lower):
        found = getattr(space, public)
        if inspect.ismodule(found) or not callable(found):
            continue
        kind = "autoclass" if inspect.isclass(found) else "autofunction"
        index = "" if name == "effjax" or public not in effjax.__all__ else "\n   :no-index:"
        parts.append(f"```{{eval-rst}}\n.. {kind}:: {name}.{public}{index}\n```\n")
    return "\n".join(parts)


def moved(page: str, origin: Path, target: Path) -> str:
    """A page at another place: links to pages of the site lead there, those to other files name the file."""

    def replaced(match: re.Match[str]) -> str:
        text, link = match[1], match[2]
        if re.match(r"[a-z]+:|#", link):
            return match[0]
        path, _, anchor = link.partition("#")
        file = (origin / path).resolve().relative_to(ROOT).as_posix()
        for pattern, place in PLACES.items():
            page = re.sub(f"^{pattern}$", place, file)
            if page != file:
                break
        else:
            return text if file.endswith(".json") else f"{text} (`{file}`)"
        return f"[{text}]({os.path.relpath(HERE / page, target)}{'#' + anchor if anchor else ''})"

    page = re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", replaced, page)
    return page.replace("](docs/pictures/", f"]({os.path.relpath(HERE / 'pictures', target)}/")


def mathml(equation: str, display: str) -> str:
    r"""An equation as MathML; lines separated by ``\\\\`` are aligned at their ``&``."""
    from latex2mathml.converter import convert

    if r"\\" in equation and r"\begin" not in equation:
        equation = rf"\begin{{aligned}}{equation}\end{{aligned}}"
    return convert(re.sub(r"\\arg\b", r"\\operatorname{arg}", equation), display=display)


def setup(app) -> None:
    """Equations become MathML. Pages written by hand link to files of the repository; here to pages of the site."""

    def move_links(app, name: str, source: list[str]) -> None:
        if not name.startswith("_pages/"):
            source[0] = moved(source[0], HERE, HERE)

    def not_a_list(app, what, name, found, options, lines: list[str]) -> None:
        """``classes: K.`` says a number's name, and does not begin a list."""
        lines[:] = [re.sub(r"^(\s+)([A-Z])\.$", r"\1:math:`\2`.", line) for line in lines]

    def inline_math(self, node) -> None:
        self.body.append(mathml(node.astext(), "inline"))
        raise nodes.SkipNode

    def block_math(self, node) -> None:
        self.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("source-read", move_links)
    app.connect("autodoc-process-docstring", not_a_list, priority=900)  # after napoleon


write_pages()
