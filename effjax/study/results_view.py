"""A study's results as what a notebook shows."""

from collections.abc import Mapping
from typing import Any

from effjax.core.storage import Folder, storage
from effjax.study.advice import members
from effjax.study.plots import figure
from effjax.study.report import group_table, html, read_curves, read_results, render


class Results(dict):
    """The content of results.json; a notebook shows its tables and its picture.

    Args:
      results: schema 2.
      curves: of curves.json, drawn beside the costs; those in ``folder`` if None.
      folder: where the results lie, with their report.

    Example:
      ``effjax.compare("samuel:smoke").plot()``
    """

    def __init__(
        self, results: Mapping[str, Any], curves: Mapping[str, Any] | None = None, *, folder: str | Folder | None = None
    ):
        super().__init__(results)
        self.folder = None if folder is None else storage(folder, "folder")
        self.curves = dict((read_curves(self.folder) if self.folder else {}) if curves is None else curves)

    @classmethod
    def read(cls, folder: str | Folder) -> "Results":
        """The results in a folder that ``effjax compare`` wrote."""
        return cls(read_results(storage(folder, "folder") / "results.json"), folder=folder)

    def table(self) -> dict[str, list[dict[str, str]]]:
        """Per group its arms as rows, best first, from column to text: what a data frame takes."""
        tables = {group: group_table(members(self, group), metric) for group, metric in self["groups"].items()}
        return {
            group: [dict(zip(("rank", *table.head[1:]), row, strict=True)) for row in table.rows]
            for group, table in tables.items()
        }

    def plot(self):
        """Quality against total seconds, training seconds and memory, as a figure of matplotlib."""
        return figure(self, self.curves)

    def report(self) -> str:
        """The whole report, in Markdown."""
        return render(self)

    def _repr_html_(self) -> str:
        return html(self, self.curves)
