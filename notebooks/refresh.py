"""Run notebooks at full size and keep their outputs: ``python notebooks/refresh.py [00_quickstart ...]``; default all.

Cells come from the paired scripts. Pictures are stored with few colours, and what is written to standard error is left
out. The measured time goes into the first cell of the notebook and of its script.
"""

import base64
import io
import os
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def small(picture: str) -> str:
    """A PNG in base64 with at most 64 colours, where that is smaller."""
    from PIL import Image

    before, after = base64.b64decode(picture), io.BytesIO()
    image = Image.open(io.BytesIO(before)).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(after, "PNG", optimize=True)
    return base64.b64encode(min(before, after.getvalue(), key=len)).decode()


def with_time(text: str, minutes: float) -> str:
    """The script with the measured minutes below its title."""
    said = f"# Takes about {round(max(1, minutes))} minute{'s' * (minutes >= 1.5)} on two CPU cores.\n#\n"
    text = re.sub(r"# Takes about \d+ minutes? on two CPU cores\.\n#\n", "", text)
    return re.sub(r"(# %% \[markdown\]\n# # .*\n#\n)", lambda found: found[1] + said, text, count=1)


def refresh(path: Path) -> None:
    """Run one notebook and write it."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    notebook, held = jupytext.read(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    notebook.metadata = held.metadata
    start = time.perf_counter()
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
    minutes = (time.perf_counter() - start) / 60
    path.write_text(with_time(path.read_text(), minutes))
    notebook.cells[0].source = jupytext.read(path).cells[0].source
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = small(output.data["image/png"])
            if "text/html" in output.get("data", {}) and "image/png" in output.data["text/html"]:
                head, mark, rest = output.data["text/html"].partition("base64,")
                picture, quote, tail = rest.partition('"')
                output.data["text/html"] = head + mark + small(picture) + quote + tail
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    size = path.with_suffix(".ipynb").stat().st_size / 1e3
    print(f"{path.stem}: {minutes:.1f} minutes, {size:.0f} kB", flush=True)


def main() -> None:
    """Run those named."""
    os.environ.pop("EFFJAX_SMOKE", None)
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    scripts = [HERE / f"{name}.py" for name in sys.argv[1:]] or sorted(HERE.glob("[0-9]*.py"))
    for path in scripts:
        refresh(path)


if __name__ == "__main__":
    main()
