"""Tables of configs/launch/README.md from the JSON files beside it; as a command it rewrites them."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "launch"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    line = lambda cells: f"| {' | '.join(cells)} |"
    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])


def collectives(report: dict[str, Any]) -> str:
    """What a device sends in a step."""
    size = lambda number: f"{number / 1e9:.3g}"
    words = ("GB sent in a step", "expected", "of it parameters", "gradients", "activations")
    rows = []
    for name, found in report["collectives"].items():
        kinds = ", ".join(f"{kind['calls']} {word}" for word, kind in found["collectives"].items())
        should = found["expected_bytes"]
        parts = [size(should.get(part, 0)) for part in ("parameters", "gradients", "activations")]
        rows.append((name, kinds, size(found["sent_bytes"]), size(sum(should.values())), *parts))
    return _table(("model, layout, data x model", "calls", *words), rows)


def predictions(report: dict[str, Any]) -> str:
    """Milliseconds and gigabytes on chips that were not there."""
    kinds, rows = list(report["chips"]), []
    for name, found in report["predictions"].items():
        model, layout, *_ = name.split(" ")
        for chips in (8, 64, 256):
            cells = [_cell(found[f"{chips} {kind}"]) for kind in kinds]
            rows.append((f"{model}, {layout}", str(chips), str(found[f"{chips} {kinds[0]}"]["examples"]), *cells))
    return _table(("model, layout", "chips", "examples a step", *kinds), rows)


def _cell(row: dict[str, Any]) -> str:
    if not row["fits"]:
        return f"does not fit ({row['gigabytes']:.0f} GB)"
    return f"{row['least_ms']:.0f} to {row['most_ms']:.0f} ms, {row['gigabytes']:.1f} GB"


def memory(runs: list[dict[str, Any]]) -> str:
    """Peaks of runs of ``sharded_load.py``."""
    rows = []
    for run in runs:
        what = f"{run['parameters'] / 1e6:.0f} M, {run['rules']} {' x '.join(map(str, run['mesh']))}"
        what += f", {run['processes']} processes" if run["processes"] > 1 else ""
        peaks = run["host_peak_megabytes"]
        losses = {name: run[name].get("losses", ()) for name in ("lora", "cola") if name in run}
        if not any(losses.values()):  # stopped, to go on elsewhere
            continue
        said = ["; ".join(", ".join(f"{value:.4f}" for value in found) for found in losses.values())]
        done = f"{' and '.join(losses)}, {'saved after each step' if run['saved'] else 'not saved'}"
        cells = (f"{run['bytes'] / 1e6:.0f}", f"{peaks['load']}", f"{max(peaks.values())}")
        rows.append((what, "yes" if run["narrow"] else "no", done, *cells, *said))
    head = ("decoder, layout", "--narrow", "trained", "MB of parameters", "MB to load", "MB at most", "losses")
    return _table(head, rows)


def loop(found: dict[str, Any]) -> str:
    """What the loop costs, as a list."""
    empty, idle, saves, weak = (found[name] for name in ("empty_steps", "idle_share", "checkpoints", "weak_scaling"))
    ratios = ", ".join(f"{n}: {row['over_n_times_one']:.2f}" for n, row in weak.items())
    rate, folder, hand = empty["fit_steps_per_s"], empty["fit_with_a_folder_us"], empty["by_hand_us"]
    lines = (
        f"- An empty step takes {empty['fit_us']:.0f} us of the host in `fit` ({rate:.0f} steps a second), "
        f"{folder:.0f} with a folder, {hand:.0f} in a loop by hand.",
        f"- On a text study with steps of {idle['step_ms']:.1f} ms the device is idle for "
        f"{100 * idle['idle_share']:.1f} % of the time.",
        f"- A checkpoint of {saves['megabytes']} MB holds the loop for {1e3 * saves['held_s']:.0f} ms; written behind "
        f"it, it adds {1e3 * saves['added_s_per_save']:.0f} ms to the run, on cores that the steps use too.",
        "- Weak scaling on devices that share one machine's cores: time of a step on n of them over n times that on "
        f"one, {ratios}. Below 1 one device alone does not fill the cores, above 1 is the "
        "cost of cutting and collectives; it says nothing of networks.",
    )
    return "\n".join(lines)


MAKERS = {"collectives": collectives, "predictions": predictions, "memory": memory, "loop": loop}
FILES = {"collectives": "pods.json", "predictions": "pods.json", "memory": "memory.json", "loop": "loop.json"}


def filled(page: str, folder: Path = FOLDER) -> str:
    """The page with its tables."""
    for name, make in MAKERS.items():
        text = make(json.loads((folder / FILES[name]).read_text()))
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page = f"{before}{begin}{text}\n{end}{after}"
    return page


if __name__ == "__main__":
    path = FOLDER / "README.md"
    path.write_text(filled(path.read_text()))
