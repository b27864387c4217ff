"""The README's table of results, generated from the committed results: ``python -m effjax.study.readme``."""

from pathlib import Path

from effjax.study.report import hardware_name, number, read_results
from effjax.study.resolve import configs_folder

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def results_table(configs: Path) -> str:
    """Every decided claim of every committed result, failing ones included."""
    lines = ["| study | | claim | measured | | bound | on |", "|---|---|---|---|---|---|---|"]
    for path in sorted(configs.glob("*/results/*.json")):
        results = read_results(path)
        where = hardware_name(results["environment"]["hardware"])
        link = f"[{results['study']}:{results['preset']}](configs/{path.relative_to(configs)})"
        for claim in results["claims"]:
            verdict = "holds" if claim["holds"] else "**fails**"
            lines.append(
                f"| {link} | {verdict} | {claim['text']} | {number(claim['left'])} | {claim['op']} | "
                f"{number(claim['right'])} | {where} |"
            )
    return "\n".join(lines)


def replace_table(readme: str, table: str) -> str:
    """The README with its table replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"README.md lacks the markers {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


if __name__ == "__main__":
    path = configs_folder().parent / "README.md"
    path.write_text(replace_table(path.read_text(), results_table(configs_folder())))
