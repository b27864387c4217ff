"""Tables of measured numbers in the README, docs/results.md and the cards: ``python -m effjax.study.readme``.

The README's table has a row per method. Its sentences stand in the card, with places for numbers of a results file. A
place names an arm and a metric, or two of them for their ratio, of the group in the first line or of another::

    <!-- headline cpu-amd-epyc-2-cores sst2-encoder-2x64
    saves: {buckets train_s} s of training in place of {static train_s}, {buckets step_ms / static step_ms} of a step
    quality: accuracy {buckets accuracy} against {text-amd-epyc-2-cores:sst2-minilm/static accuracy}
    loses: where all texts have the same length
    -->

docs/results.md lists every claim. A card's table stands between two comments, the first of which says what it shows::

    <!-- table cpu-amd-epyc-2-cores
    rows: plain, method
    accuracy = sst2-minilm accuracy
    train s = sst2-minilm train_s
    -->
    <!-- end of table -->
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from effjax.study.claims import costs_of, value
from effjax.study.report import hardware_name, in_table, number, read_results
from effjax.study.resolve import configs_folder

Results = Mapping[str, Any]

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
_TABLE = re.compile(r"(<!-- table ([\w.-]+)\n(.*?)\n-->\n).*?(<!-- end of table -->)", re.DOTALL)
_HEADLINE = re.compile(r"^# (.*)\n\n<!-- headline ([\w.-]+) ([\w.-]+)\nsaves: (.*)\nquality: (.*)\nloses: (.*)\n-->")
_PLACE = re.compile(r"\{([^{}]*)\}")


def methods_table(configs: Path) -> str:
    """A row per method: what it saved at which quality, where it does not pay, and what it was measured on."""
    lines = ["| method | what it saved | quality | where it does not pay | measured |", "|---" * 5 + "|"]
    lines += [_method_row(presets.parent) for presets in sorted(configs.glob("*/presets.py"))]
    holds = [claim["holds"] for _, _, claim in _claims(configs)]
    count = (
        f"Of {len(holds)} claims of the studies, {holds.count(False)} fail: [all of them](docs/results.md). Benchmarks "
        "beside other libraries are in the cards."
    )
    return "\n".join([*lines, "", count])


def results_table(configs: Path) -> str:
    """Every claim of every committed result, those that fail first."""
    lines = ["| study | | group | claim | measured | | bound | on |", "|---|---|---|---|---|---|---|---|"]
    for path, results, claim in sorted(_claims(configs), key=lambda found: found[2]["holds"]):
        where = hardware_name(results["environment"]["hardware"])
        link = f"[{results['study']}:{results['preset']}](../configs/{path.relative_to(configs)})"
        verdict = "holds" if claim["holds"] else "**fails**"
        text = f"{claim['group']} | {in_table(claim['text'])}"
        numbers = f"{number(claim['left'])} | {claim['op']} | {number(claim['right'])}"
        lines.append(f"| {link} | {verdict} | {text} | {numbers} | {where} |")
    return "\n".join(lines)


def replace_table(page: str, table: str) -> str:
    """A page with the table between its markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page lacks the markers {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _claims(configs: Path) -> Iterator[tuple[Path, Results, Results]]:
    """All claims, each with its file and what that holds; those that the clock decides after the others of a file."""
    for path in sorted(configs.glob("*/results/*.json")):
        results = read_results(path)
        if results["config"] is not None:  # else a benchmark against other libraries, shown in a card
            yield from ((path, results, claim) for claim in (*results["claims"], *results["cost_claims"]))


def _method_row(folder: Path) -> str:
    found = _HEADLINE.match((folder / "README.md").read_text())
    if found is None:
        raise ValueError(
            f"configs/{folder.name}/README.md must begin with its title and a headline (see effjax/study/readme.py)."
        )
    title, file, group, *sentences = found.groups()
    read = functools.cache(lambda name: read_results(folder / "results" / f"{name}.json"))
    cells = [_PLACE.sub(lambda place: _number_at(place[1], read, file, group), text) for text in sentences]
    link = f"[{read(file)['preset']}](configs/{folder.name}/results/{file}.json)"
    where = hardware_name(read(file)["environment"]["hardware"])
    return f"| [{title}](configs/{folder.name}/README.md) | {' | '.join(cells)} | {link}, {where} |"


def _number_at(place: str, read: Callable[[str], Results], file: str, group: str) -> str:
    """What a place of a headline stands for: ``arm metric``, or ``arm metric / arm metric``; after either, `` %``."""
    values = []
    for part in place.removesuffix(" %").split(" / "):
        where, _, metric = part.rpartition(" ")
        source, _, arm = where.rpartition(":")
        source, arm = source or file, arm if "/" in arm else f"{group}/{arm}"
        arms = read(source)["arms"]
        values.append(value(arms[arm], metric) if arm in arms else math.nan)
        if math.isnan(values[-1]):
            raise ValueError(f"a headline's place {part!r}: {source}.json has no {arm!r} with {metric!r}.")
    found = values[0] if len(values) == 1 else values[0] / values[1]
    return f"{100 * found:.0f} %" if place.endswith(" %") else f"{found:.3g}"


def replace_card_tables(card: str, results: Path) -> str:
    """A card with the tables between its markers replaced.

    Args:
      card: its Markdown.
      results: the folder that holds the results named by the markers.
    """

    def filled(match: re.Match[str]) -> str:
        table = _card_table(read_results(results / f"{match[2]}.json")["arms"], match[3])
        return f"{match[1]}{table}\n{match[4]}"

    return _TABLE.sub(filled, card)


def _card_table(arms: Mapping[str, Any], description: str) -> str:
    fields = [tuple(part.strip() for part in line.split("=")) for line in description.splitlines() if "=" in line]
    rows = re.search(r"^rows: (.*)$", description, re.MULTILINE)
    if rows is None or not fields or any(len(field) != 2 or field[1].count(" ") != 1 for field in fields):
        raise ValueError(
            f"a table's marker must hold 'rows: arm, ...' and lines 'title = group metric', not:\n{description}"
        )
    lines = [f"| arm | {' | '.join(title for title, _ in fields)} |", "|---" * (len(fields) + 1) + "|"]
    for row in (name.strip() for name in rows[1].split(",")):
        found = {where: arms.get(f"{where.split()[0]}/{row}") for _, where in fields}
        label = next((arm["label"] for arm in found.values() if arm), None)
        if label is None:
            raise ValueError(f"rows: {row!r} is in none of the groups {sorted({where.split()[0] for where in found})}.")
        lines.append(
            f"| {in_table(label)} | {' | '.join(_cell(arm, where.split()[1]) for where, arm in found.items())} |"
        )
    return "\n".join(lines)


def _cell(arm: Mapping[str, Any] | None, field: str) -> str:
    if arm is None:
        return "-"
    metric = arm["metrics"].get(field)
    if metric is None:
        return number(costs_of(arm).get(field))
    spread = f" ± {number(metric['std'])}" if len(metric["values"]) > 1 else ""
    return number(metric["mean"]) + spread


if __name__ == "__main__":
    for name, table in (("README.md", methods_table), ("docs/results.md", results_table)):
        page = configs_folder().parent / name
        page.write_text(replace_table(page.read_text(), table(configs_folder())))
    for card in configs_folder().glob("*/README.md"):
        card.write_text(replace_card_tables(card.read_text(), card.parent / "results"))
