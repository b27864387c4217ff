"""report.md and report.png from a folder's results alone."""

import base64
import html as _html
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from effjax.core.files import read_json
from effjax.core.storage import Folder, storage, write_text
from effjax.study.advice import clocks, level, members, number, ranked, short, spread, take
from effjax.study.claims import costs_of, value
from effjax.study.curves import about_curves
from effjax.study.frontier import pareto
from effjax.study.plots import draw, picture

SCHEMA = 2
_KEYS = ("schema", "study", "preset", "seeds", "budget", "groups", "arms", "claims", "environment")

# Columns of costs: heading, factor. Of the second kind only those that some arm has.
_COSTS = {
    "total_s": ("total s", 1.0),
    "train_s": ("train s", 1.0),
    "peak_bytes": ("peak MB", 1e-6),
    "compile_s": ("compile s", 1.0),
    "evaluate_s": ("evaluate s", 1.0),
    "step_ms": ("step ms", 1.0),
    "examples_per_s": ("examples/s", 1.0),
    "macs_per_example": ("M MACs/example", 1e-6),
}
_MORE_COSTS = {
    "temp_bytes": ("temp MB", 1e-6),
    "tokens": ("M tokens", 1e-6),
    "trained_params": ("trained", 1.0),
    "between_ms": ("between ms", 1.0),
    "inference_examples_per_s": ("inferences/s", 1.0),
}
_LEGEND = (
    "`total` is compiling, training and evaluating: the mean over seeds, with compiling counted once per arm; `train` "
    "is seconds of stepping for one seed. A sweep's times are the sums over its members. `peak` is XLA's arguments + "
    "outputs - aliased + temporaries of the step, `temp` these temporaries alone. `step` is the steady-state median "
    "with all arms of the group interleaved; of an arm whose batches differ in shape it is the mean over the steps of "
    "a run. `tokens` are the positions processed in a run, padding included; `trained` are the numbers that the "
    "optimizer moves; `between` is the first work between two steps (a knot); `inferences` are examples of calls "
    "without training."
)
_CACHED = (
    " Some programs came from the folder of compiled programs (EFFJAX_COMPILE_CACHE=off does without one): compile and "
    "total seconds may be less than those of a first run."
)


class Table(NamedTuple):
    """A heading and rows of Markdown cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Heading(NamedTuple):
    """A title and its level."""

    text: str
    depth: int = 2


Block = str | Table | Heading
"""A part of the report; a string is a paragraph, or a list whose lines begin with '- '."""


def write_report(out: Folder) -> None:
    """Write ``report.md`` and ``report.png`` beside a folder's ``results.json``."""
    out = storage(out, "folder")
    results = read_results(out / "results.json")
    write_text(out / "report.md", render(results))
    draw(results, read_curves(out), out / "report.png")


def read_curves(out: Folder) -> dict[str, Any]:
    """The curves beside a folder's results; empty if there are none."""
    path = out / "curves.json"
    way_out = "Delete it to write the report without curves."
    found = read_json(path, way_out) if path.exists() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not curves. {way_out}")
    return found


def read_results(path: Folder) -> dict[str, Any]:
    """Read a results.json.

    Raises:
      FileNotFoundError, ValueError: it is missing, or not what this version writes.
    """
    path = storage(path, "folder")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Run `effjax compare` with --out {path.parent} first.")
    results = read_json(path, "Run the study again.")
    check_results(results, str(path))
    return results


def check_results(results: Any, where: str) -> None:
    """Raise ``ValueError`` unless ``results`` has the schema of this version."""
    schema = results.get("schema") if isinstance(results, dict) else None
    if isinstance(schema, int) and schema != SCHEMA:
        older = schema < SCHEMA
        way = "Run the study again into a new folder." if older else "Install a newer effjax to read it."
        raise ValueError(
            f"{where} has schema {schema}, of {'an older' if older else 'a newer'} effjax; this version reads schema "
            f"{SCHEMA}. {way}"
        )
    missing = [key for key in _KEYS if not isinstance(results, dict) or key not in results]
    if missing:
        raise ValueError(f"{where} is no effjax result: it lacks {missing}.")
    strays = sorted({arm["group"] for arm in results["arms"].values()} - set(results["groups"]))
    if strays:
        raise ValueError(f"{where}: arms are in {strays}, which 'groups' lacks.")


def render(results: Mapping[str, Any]) -> str:
    """The report as Markdown: claims first, a table per group, and last what to take."""
    return "\n".join(_markdown(block) for block in blocks(results))


def html(results: Mapping[str, Any], curves: Mapping[str, Any] | None = None) -> str:
    """The report for a notebook, its picture inside."""
    found = list(blocks(results))
    first = next(i for i, block in enumerate(found) if isinstance(block, Heading) and block.depth == 2)
    image = base64.b64encode(picture(results, curves or {})).decode()
    parts = [_as_html(block) for block in found]
    parts.insert(first, f'<img alt="quality against cost" style="max-width: 100%" src="data:image/png;base64,{image}">')
    return "<div>\n" + "\n".join(parts) + "\n</div>"


def blocks(results: Mapping[str, Any]) -> Iterator[Block]:
    """The parts of the report."""
    yield Heading(f"{results['study']}: {results['preset']}", 1)
    yield _where(results)
    yield from _about_data(results)
    idle = results.get("idle", [])
    yield from _claims("Claims", results["claims"], results, idle)
    timed = [claim for claim in results.get("cost_claims", []) if claim not in results["claims"]]
    yield from _claims("Claims about costs of this run (decided by the clock)", timed, results, idle)
    yield from _idle(results, idle)
    diverged = [name for name, arm in results["arms"].items() if arm["status"] == "diverged"]
    if diverged:
        yield Heading("Diverged")
        yield "\n".join(f"- `{name}`: {_why(results, name)}" for name in diverged)
    for group, metric in results["groups"].items():
        arms = members(results, group)
        if arms:
            yield Heading(group)
            if said := results.get("about", {}).get(group):
                yield "\n".join(f"- {sentence}" for sentence in said)
            yield group_table(arms, metric)
            yield from _notes(arms, metric)
            yield from about_curves(results, group)
    yield _LEGEND
    yield Heading("What to take")
    for group in results["groups"]:
        if members(results, group):
            yield f"**{group}**"
            yield "\n".join(f"- {line}" for line in take(results, group))
    yield _holds_for(results)


def _where(results: Mapping[str, Any]) -> str:
    environment = results["environment"]
    packages = environment["packages"]
    return (
        f"{_budget(results)} per run, seeds {_seeds(results)}. {hardware_name(environment['hardware'])}; "
        f"jax {packages['jax']}, optax {packages['optax']}, Python {packages['python']}; "
        f"commit {environment['commit'] or 'unknown'}; {environment['date']}."
    ) + (_CACHED if environment.get("compile_cache") else "")


def _about_data(results: Mapping[str, Any]) -> Iterator[Block]:
    """What was trained and tested on: of data of one's own all that is known of them."""
    once = [re.sub(r" \([^()]*\): Rows: ", ": Rows: ", fact) for fact in _facts(_data(results))]
    found = [fact if fact.endswith(".") else f"{fact}." for fact in once]
    for rows, what in (("train_rows", "training"), ("test_rows", "test")):
        if isinstance(most := results["config"].get(rows), int):
            found.append(f"Of the {what} rows {most:,} were used ({rows}).")
    if found:
        yield f"**Data**: {' '.join(found)}"


def _budget(results: Mapping[str, Any]) -> str:
    return f"{results['budget']['amount']:,g} {results['budget']['unit'].replace('_', ' ')}"


def _seeds(results: Mapping[str, Any]) -> str:
    return ", ".join(map(str, results["seeds"]))


def _data(results: Mapping[str, Any]) -> Any:
    return results.get("data") or results["environment"].get("data")


def _facts(data: Any) -> list[str]:
    """Facts about the data as phrases, whether they are text, a list or a mapping."""
    if isinstance(data, Mapping):
        parts = {name: ", ".join(_facts(found)) for name, found in data.items()}
        return [f"{name.replace('_', ' ')}: {found}" for name, found in parts.items() if found]
    if isinstance(data, list | tuple):
        return [fact for found in data for fact in _facts(found)]
    if data is None:
        return []
    return [f"{data:,}" if isinstance(data, int) else number(data) if isinstance(data, float) else str(data)]


def _holds_for(results: Mapping[str, Any]) -> str:
    # A source of one's own goes on after the numbers of rows and classes.
    size = [fact.partition("): Rows: ")[0] + ")" * ("): Rows: " in fact) for fact in _facts(_data(results))]
    size += [f"{_budget(results)} per run"]
    size += [f"seed{'s' * (len(results['seeds']) > 1)} {_seeds(results)}"]
    size += [hardware_name(results["environment"]["hardware"])]
    return f"This holds for: {'; '.join(size)}. Another size or machine may order the arms differently."


def hardware_name(hardware: Mapping[str, Any]) -> str:
    """One phrase for what the results ran on.

    Example:
      >>> hardware_name({"platform": "cpu", "cpu": "AMD EPYC", "cores": 1})
      'AMD EPYC, 1 core'
    """
    if hardware["platform"] == "cpu":
        return f"{hardware['cpu']}, {hardware['cores']} core{'' if hardware['cores'] == 1 else 's'}"
    return f"{hardware['devices']} x {hardware['device_kind']}"


def verdict(claim: Mapping[str, Any]) -> str:
    """Whether a claim holds, in words; one that does not is as visible as one that does."""
    if claim.get("undecided"):
        return f"**UNDECIDED** ({claim['undecided']})"
    return "holds" if claim["holds"] else "**DOES NOT HOLD**"


def _claims(title: str, claims: Sequence[Mapping[str, Any]], results, idle) -> Iterator[Block]:
    if not claims:
        return
    involved = {name for names in idle for name in names}
    several = len(results["groups"]) > 1
    rows, marked = [], False
    for claim in claims:
        mark = " †" if involved & set(claim.get("arms", ())) else ""
        marked |= bool(mark)
        row = [verdict(claim) + mark, *([claim["group"]] if several else []), claim["text"]]
        rows.append([*row, number(claim["left"]), claim["op"], number(claim["right"])])
    yield Heading(title)
    yield Table(["", *(["group"] if several else []), "claim", "measured", "", "bound"], rows)
    if marked:
        yield "† involves arms that did nothing; see below."


def _idle(results: Mapping[str, Any], idle: Sequence[Sequence[str]]) -> Iterator[Block]:
    if not idle:
        return
    yield Heading("Arms that did nothing")
    yield "The parameters of these arms are equal to the last bit: what sets the arms apart had no effect here."
    lines = []
    for names in idle:
        lines.append(f"- {' = '.join(f'`{name}`' for name in names)}")
        for claim in (*results["claims"], *results.get("cost_claims", [])):
            if set(names) & set(claim.get("arms", ())):
                lines.append(f"  - {claim['group']}: {verdict(claim)}: {claim['text']}")
    yield "\n".join(dict.fromkeys(lines))


def _why(results: Mapping[str, Any], name: str) -> str:
    """Why an arm counts as diverged."""
    arm = results["arms"][name]
    told = arm.get("why")
    lost = [found["values"] for found in arm["metrics"].values()]
    seeds = [seed for i, seed in enumerate(results["seeds"]) if any(i < len(v) and v[i] is None for v in lost)]
    where = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else "all seeds"
    reasons = "; ".join(dict.fromkeys(filter(None, [told] if isinstance(told, str) else told or [])))
    return f"{reasons or 'no finite loss'} ({where})"


def group_table(arms: Mapping[str, Mapping[str, Any]], metric: Mapping[str, str]) -> Table:
    """One group's arms, best first; total seconds, training seconds and peak memory side by side."""
    others = sorted({name for arm in arms.values() for name in arm["metrics"]} - {metric["name"]})
    trained = any(arm["metrics"] for arm in arms.values())
    costs = _COSTS | {
        name: what for name, what in _MORE_COSTS.items() if any(name in costs_of(arm) for arm in arms.values())
    }
    costs = {
        name: what for name, what in costs.items() if any(costs_of(arm).get(name) is not None for arm in arms.values())
    }
    arrow = "lower is better" if metric["goal"] == "min" else "higher is better"
    front = set(_front(arms, metric)[0])
    head = [
        "",
        "arm",
        *([f"{metric['label']} ({arrow})"] if trained else []),
        *(title for title, _ in costs.values()),
        *others,
    ]
    rows = []
    for index, name in enumerate(ranked(arms, metric)):
        arm = arms[name]
        label = _label(name, arms)
        if "best" in arm:
            best = _label(arm["best"], arms) if arm["best"] in arms else arm["best"]
            label += f" ({arm.get('runs', 'several')} runs; the best is {best})"
        row = [
            str(index + 1),
            label + (" \\*" if name in front else ""),
            *([spread(arm, metric["name"])] if trained else []),
        ]
        row += [number(_scaled(costs_of(arm).get(cost), factor)) for cost, (_, factor) in costs.items()]
        rows.append(row + [spread(arm, other) for other in others])
    return Table(head, rows)


def _label(name: str, arms: Mapping[str, Mapping[str, Any]]) -> str:
    return arms[name]["label"] or short(name, arms)


def _front(arms: Mapping[str, Mapping[str, Any]], metric: Mapping[str, str]) -> tuple[list[str], str]:
    """The front of quality against total seconds, or against training seconds where the total is not known."""
    for clock, words in (("total_s", "total seconds"), ("train_s", "training seconds")):
        points = {
            name: (arm["cost"][clock], value(arm, metric["name"]))
            for name, arm in arms.items()
            if arm["cost"].get(clock) is not None
        }
        front = pareto(points, metric["goal"])
        if front:
            return front, words
    return [], ""


def _notes(arms: Mapping[str, Mapping[str, Any]], metric: Mapping[str, str]) -> Iterator[Block]:
    front, words = _front(arms, metric)
    notes = [f"\\* on the front of quality against {words}."] if front else []
    best = level(arms, metric)
    if len(best) > 1 and any(len(arm["metrics"][metric["name"]]["values"]) > 1 for arm in (arms[best[0]],)):
        notes.append(f"Within one standard error of the best: {', '.join(short(name, arms) for name in best[1:])}.")
    notes += clocks(arms, metric)
    if notes:
        yield " ".join(notes)


def _scaled(found: float | None, factor: float) -> float | None:
    return None if found is None else found * factor


# Markdown and HTML


def in_table(text: str) -> str:
    r"""Text for a cell of a Markdown table.

    Example:
      >>> in_table("|x| of 1")
      '\\|x\\| of 1'
    """
    return text.replace("|", "\\|")


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.depth} {block.text}\n"
    if isinstance(block, str):
        return block + "\n"
    rows = [block.head, ["---"] * len(block.head), *block.rows]
    return "".join("| " + " | ".join(in_table(cell) for cell in row) + " |\n" for row in rows)


def _as_html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.depth + 1}>{_inline(block.text)}</h{block.depth + 1}>"
    if isinstance(block, str):
        if not block.startswith("- "):
            return f"<p>{_inline(block)}</p>"
        items = (line.lstrip().removeprefix("- ") for line in block.splitlines())
        return f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>"
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.head)
    rows = ("".join(f"<td>{_inline(cell)}</td>" for cell in row) for row in block.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


def _inline(text: str) -> str:
    text = _html.escape(text.replace("\\*", "\N{LOW ASTERISK}"), quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
