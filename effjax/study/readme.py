"""Tables of measured numbers in the README and the cards: ``python -m effjax.study.readme`` writes them.

The README's lists every claim. A card's stands between two comments, the first of which says what it shows::

    <!-- table cpu-amd-epyc-2-cores
    rows: plain, method
    accuracy = sst2-minilm accuracy
    train s = sst2-minilm train_s
    -->
    <!-- end of table -->
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effjax.study.claims import costs_of
from effjax.study.report import hardware_name, in_table, number, read_results
from effjax.study.resolve import configs_folder

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
_TABLE = re.compile(r"(<!-- table ([\w.-]+)\n(.*?)\n-->\n).*?(<!-- end of table -->)", re.DOTALL)


def results_table(configs: Path) -> str:
    """Every claim of every committed result, failing ones included; those decided by the clock after the others."""
    lines = ["| study | | group | claim | measured | | bound | on |", "|---|---|---|---|---|---|---|---|"]
    for path in sorted(configs.glob("*/results/*.json")):
        results = read_results(path)
        if results["config"] is None:  # a benchmark against other libraries, shown in a card
            continue
        where = hardware_name(results["environment"]["hardware"])
        link = f"[{results['study']}:{results['preset']}](configs/{path.relative_to(configs)})"
        for claim in (*results["claims"], *results["cost_claims"]):
            verdict = "holds" if claim["holds"] else "**fails**"
            text = f"{claim['group']} | {in_table(claim['text'])}"
            numbers = f"{number(claim['left'])} | {claim['op']} | {number(claim['right'])}"
            lines.append(f"| {link} | {verdict} | {text} | {numbers} | {where} |")
    return "\n".join(lines)


def replace_table(readme: str, table: str) -> str:
    """The README with its table replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"README.md lacks the markers {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


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
    value = arm["metrics"].get(field)
    if value is None:
        return number(costs_of(arm).get(field))
    spread = f" ± {number(value['std'])}" if len(value["values"]) > 1 else ""
    return number(value["mean"]) + spread


if __name__ == "__main__":
    path = configs_folder().parent / "README.md"
    path.write_text(replace_table(path.read_text(), results_table(configs_folder())))
    for card in configs_folder().glob("*/README.md"):
        card.write_text(replace_card_tables(card.read_text(), card.parent / "results"))
