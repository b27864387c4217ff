r"""The user's own data, of every modality, by one call.

Texts, from a CSV file with the columns ``body`` and ``kind``; a fifth of every class is held out:

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> rows = [f"message {row},{'spam' if row % 2 else 'ham'}" for row in range(10)]
    >>> _ = (folder / "messages.csv").write_text("\n".join(["body,kind", *rows]))
    >>> data = read_data("text", folder / "messages.csv", text="body", label="kind", split=0.2)
    >>> for sentence in data.facts.sentences:
    ...     print(sentence)
    Rows: 8 train, 2 test.
    2 classes: ham (4 + 1), spam (4 + 1).
    Texts of 9 characters.
    2 of 10 rows were held out to test on (20%; the same share of every class, drawn with seed 0).

Pictures, from a folder of class folders, made one size:

    >>> from PIL import Image
    >>> for name in ("cat", "dog"):
    ...     (folder / "pets" / name).mkdir(parents=True)
    ...     for number in range(5):
    ...         Image.new("RGB", (20 + number, 20)).save(folder / "pets" / name / f"{number}.png")
    >>> read_data("image", folder / "pets", size=(16, 16)).splits["train"]["image"].shape
    (8, 16, 16, 3)

Series of unequal length, one row per step:

    >>> steps = [f"{run},{t},{t * run},{run % 2}" for run in range(10) for t in range(3 + run)]
    >>> _ = (folder / "runs.csv").write_text("\n".join(["id,time,speed,label", *steps]))
    >>> data = read_data("sequence", folder / "runs.csv")
    >>> data.train["inputs"].shape, data.facts.sizes
    ((8, 12, 1), 'Series of 3 to 12 steps, median 7.5, 1 feature.')

A graph, from a list of edges and a table of nodes:

    >>> _ = (folder / "edges.csv").write_text("source,target\nann,bob\nbob,eve\n")
    >>> _ = (folder / "people.csv").write_text("id,age,label\nann,31,x\nbob,25,y\neve,40,x\n")
    >>> read_data("graph", folder / "edges.csv", nodes=folder / "people.csv", undirected=True).facts.summary
    'nodes 3, edges 4, 2 classes'

Every result has ``facts``: rows, classes, sizes, what was held out and how, what was not read, and a fingerprint of the
decoded columns.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

from effjax.core.errors import check_choice, near
from effjax.data.graph_tables import graph_from_files
from effjax.data.graphs import GraphData
from effjax.data.image_files import image_data
from effjax.data.sequences import SequenceData
from effjax.data.series import series_data
from effjax.data.sets import DataSet
from effjax.data.text_files import text_data

__all__ = ["read_data"]

Modality = Literal["text", "image", "sequence", "graph"]
READERS: dict[str, Callable] = {
    "text": text_data,
    "image": image_data,
    "sequence": series_data,
    "graph": graph_from_files,
}


def read_data(modality: Modality, path: str | os.PathLike, **columns: Any) -> DataSet | SequenceData | GraphData:
    r"""Read the user's own data for one kind of task.

    ============  =====================  =====================================================================
    modality      function               path
    ============  =====================  =====================================================================
    ``text``      ``text_data``          CSV, TSV, JSON lines, JSON, Parquet, npz, a Hugging Face data set
    ``image``     ``image_data``         a folder of class folders, npz, a table of pictures or of their paths
    ``sequence``  ``series_data``        a table of steps or of lists, npz of padded arrays with lengths
    ``graph``     ``graph_from_files``   npz in the usual layouts, an edge list with a table of nodes
    ============  =====================  =====================================================================

    Args:
      modality: the kind of task.
      path: the file, folder, or ``hf:owner/name``.
      **columns: keywords of the function in the table; those that are None are left to their defaults.

    Returns:
      A ``DataSet``, ``SequenceData`` or ``GraphData`` whose ``facts`` say what was read.

    Raises:
      ValueError: an unknown modality, a keyword that the modality does not take, or what the function refuses.
      FileNotFoundError: nothing is there.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "messages.csv"
      >>> _ = path.write_text("body,kind\nWin now,spam\nHi,ham\nFree,spam\nSee you,ham\n")
      >>> data = read_data("text", path, text="body", label="kind", split=0.5)
      >>> data.classes, data.facts.rows
      (('ham', 'spam'), {'train': 2, 'test': 2})
    """
    check_choice("modality", modality, get_args(Modality))
    read: Callable = READERS[modality]
    legal = [name for name, item in inspect.signature(read).parameters.items() if item.kind is item.KEYWORD_ONLY]
    given = {name: value for name, value in columns.items() if value is not None}
    for name, value in given.items():
        if name not in legal:
            raise ValueError(
                f"{name}={value!r} does not apply to data of modality {modality!r}.{near(name, legal)} "
                f"It takes: {', '.join(legal)}."
            )
    return read(path, **given)


def fitting_modality(modalities: Modality | Sequence[Modality], columns: Iterable[str]) -> Modality:
    """Of the modalities that a method takes, the first whose reader has all of these keywords; else the first.

    Example:
      >>> fitting_modality(("image", "text"), ["text", "label"]), fitting_modality(("image", "text"), ["label"])
      ('text', 'image')
    """
    kinds = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    given = set(columns)
    return next((kind for kind in kinds if given <= inspect.signature(READERS[kind]).parameters.keys()), kinds[0])
