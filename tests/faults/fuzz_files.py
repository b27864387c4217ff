"""Damaged and foreign files through every public loader: each is read, or refused in one line that names it.

    python tests/faults/fuzz_files.py 10000

makes that many files of twenty kinds, mutated by bytes (bits flipped, cut, repeated, zeroed) or by content (values of
other types, numbers out of range, arrays and columns missing, renamed or of other shapes), reads each one, and prints a
count per kind and outcome. It ends with 1 where anything else than these two came:

- loaded: the loader returned, with the same content (same) or another (other: bytes without any checksum, or content
  that is as legal as what was there);
- refused: a ValueError or FileNotFoundError of one line that names the file or the folder.

A failure is any other exception, several lines, a message without a name, more than ten seconds, or the end of the
process. Failures are printed with the seed that makes them again: ``fuzz_files.py 1 --kind csv --seed 17``.
"""

import argparse
import collections
import hashlib
import json
import logging
import math
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import numpy as np
import scipy.sparse

import effjax
from effjax.data.graph_tables import graph_from_files
from effjax.finetune.lora import lora_init
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.lora_files import load_lora, load_lora_modules, save_lora

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
SLOW = 10.0
ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3.5,
    2**31,
    2**40,
    10**30,
    1e308,
    float("nan"),
    "",
    "x",
    "1",
    "é",
    [],
    [[]],
    {},
    {"a": 1},
)


class Kind(NamedTuple):
    """A valid file, how it is read, and how its content is changed.

    Attributes:
      file: name in the folder.
      load: folder -> what was read.
      change: (file, random numbers) -> None, in place; None where bytes alone are changed.
    """

    file: str
    load: Callable[[Path], Any]
    change: Callable[[Path, random.Random], None] | None


# By bytes.


def flip(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice((1, 1, 1, 4, 32))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def cut(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data))]


def remove(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    del data[start : start + draw.choice((1, 2, 16, 512))]
    return data


def repeat(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    piece = data[start : start + draw.choice((1, 16, 512))]
    return data[:start] + piece * draw.choice((2, 50)) + data[start:]


def zero(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    size = min(draw.choice((1, 8, 512)), len(data) - start)
    data[start : start + size] = bytes(size)
    return data


def noise(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    data[start : start + 8] = draw.randbytes(8)
    return data


def other_kind(data: bytearray, draw: random.Random) -> bytearray:
    heads = (
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"PK\x03\x04",
        b"\x1f\x8b",
        b"PAR1",
        b"\xff\xfe",
        b"[" * 50_000,
        b"null",
        b"{}",
        b"\x00",
    )
    return bytearray(draw.choice(heads)) + data[: draw.choice((0, len(data)))]


BYTES = (flip, flip, cut, remove, repeat, zero, noise, other_kind)


# By content.


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all values inside lists and objects."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in [(*path, key), *places(item, (*path, key))]]


def change_value(value: Any, draw: random.Random) -> Any:
    """A JSON value with one part replaced, left out, renamed or nested."""
    found = places(value)
    if not found or draw.random() < 0.03:
        return draw.choice(ODD)
    *path, last = draw.choice(found[:200] if draw.random() < 0.8 else found)
    inside = value
    for key in path:
        inside = inside[key]
    action = draw.randrange(6)
    if action == 0:
        del inside[last]
    elif action == 1 and isinstance(inside, dict):
        inside[f"{last}_"] = inside.pop(last)
    elif action == 2:
        inside[last] = [inside[last]]
    elif action == 3 and isinstance(inside[last], int | float) and not isinstance(inside[last], bool):
        inside[last] = draw.choice(
            (-inside[last], inside[last] * 2, inside[last] + 1, str(inside[last]), inside[last] / 3)
        )
    else:
        inside[last] = draw.choice(ODD)
    return value


def change_json(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(change_value(json.loads(path.read_text()), draw)))


def change_lines(path: Path, draw: random.Random) -> None:
    lines = path.read_text().splitlines()
    row = draw.randrange(len(lines))
    lines[row] = json.dumps(change_value(json.loads(lines[row]), draw))
    path.write_text("\n".join(lines))


def change_cells(path: Path, draw: random.Random) -> None:
    rows = [line.split(",") for line in path.read_text().splitlines()]
    row = draw.randrange(len(rows))
    action = draw.randrange(7)
    cells = rows[row]
    column = draw.randrange(len(cells))
    if action == 0:
        cells.pop(column)
    elif action == 1:
        cells.insert(column, "")
    elif action == 2:
        rows.pop(row)
    elif action == 3:
        for other in rows[1:]:
            other[column] = draw.choice(("nan", "", "1e400", "-1", "9" * 30, "0.5", "é"))
    elif action == 4:
        rows = rows[:1] * draw.choice((1, 2))
    else:
        cells[column] = draw.choice(
            ("", '"', '""', "nan", "inf", "1e400", str(2**40), "-1", "0.5", "\x00", "a\tb", "true")
        )
    path.write_text("\n".join(map(",".join, rows)))


def change_array(array: np.ndarray, draw: random.Random) -> Any:
    action = draw.randrange(12)
    with np.errstate(all="ignore"):
        if action == 0:
            return array[None]
        if action == 1:
            return array[..., None]
        if action == 2:
            return array[: draw.randrange(len(array) + 1)] if array.ndim else array[None]
        if action == 3 and array.dtype.kind in "biuf":
            return array.astype(
                draw.choice((np.float64, np.int8, np.uint16, np.int64, bool, np.complex64, "U8", "datetime64[s]"))
            )
        if action == 4 and array.dtype.kind in "iuf" and array.size:
            spoiled = array.astype(np.float64)
            spoiled.flat[draw.randrange(array.size)] = draw.choice((np.nan, np.inf, -np.inf, 0.5, -1))
            return spoiled
        if action == 5 and array.dtype.kind in "iu" and array.size:
            large = array.astype(np.int64)
            large.flat[draw.randrange(array.size)] = draw.choice((-1, -2, 2**31, 2**40, 999, 2**32 + 1))
            return large
        if action == 6:
            return array.reshape(-1)
        if action == 7:
            return array.T
        if action == 8:
            return np.asarray(draw.choice(("text", 7, np.nan, 2**60)))
        if action == 9:
            return np.concatenate([array, array]) if array.ndim else array
        if action == 10:
            return array[:0] if array.ndim else array
    return np.full(array.shape, draw.choice((0, -1, 1)), array.dtype if array.dtype.kind in "if" else np.int8)


def change_arrays(path: Path, draw: random.Random) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    name = draw.choice(sorted(arrays))
    action = draw.randrange(8)
    if action == 0:
        arrays.pop(name)
    elif action == 1:
        arrays[f"{name}_2"] = arrays.pop(name)
    elif action == 2:
        arrays["notes"] = np.arange(3)
    else:
        arrays[name] = change_array(arrays[name], draw)
    np.savez(path, **arrays)


def change_parquet(path: Path, draw: random.Random) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = pq.read_table(path).to_pydict()
    name = draw.choice(sorted(columns))
    action = draw.randrange(6)
    if action == 0:
        columns.pop(name)
    elif action == 1:
        columns[f"{name}_"] = columns.pop(name)
    elif action == 2:
        columns[name] = [draw.choice((1, -1, 2**40, 0))] * len(columns[name])
    elif action == 3:
        columns[name] = [draw.choice((1.5, math.nan))] * len(columns[name])
    elif action == 4:
        columns[name] = [[value] for value in columns[name]]
    else:
        columns[name][draw.randrange(len(columns[name]))] = None
    pq.write_table(pa.table(columns), path)


def change_tensors(path: Path, draw: random.Random) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    action = draw.randrange(6)
    if action == 0:
        tensors.pop(name)
    elif action == 1:
        tensors[f"{name}.x"] = tensors.pop(name)
    elif action == 2:
        tensors["notes"] = np.arange(3)
    else:
        changed = np.asarray(change_array(tensors[name], draw))
        tensors[name] = np.ascontiguousarray(changed if changed.dtype.kind in "biuf" else tensors[name][:0])
    save_file(tensors, path)


# The kinds.

PARAMS = {"query": {"kernel": np.ones((16, 8), np.float32)}, "head": {"kernel": np.ones((8, 2), np.float32)}}
NAMES = {"query/kernel": "self.query", "head/kernel": "classifier"}


def make(folder: Path) -> None:
    """Every valid file."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    draw = np.random.default_rng(0)
    shutil.copytree(REFERENCE / "transformers" / "bert", folder / "model")
    shards = shutil.copytree(REFERENCE / "transformers" / "bert", folder / "shards")
    (shards / "model.safetensors").rename(shards / "model-00001-of-00001.safetensors")
    from safetensors.numpy import load_file

    names = load_file(shards / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    config = LoraConfig(LoraRule("query/kernel", rank=4))
    lora = lora_init(jax.random.key(0), PARAMS, config)
    save_lora(folder / "adapter", lora, config, NAMES, task_type="SEQ_CLS", modules={"head": PARAMS["head"]})
    (folder / "tokenizer").mkdir()
    from effjax.data.tokens import train_tokenizer

    train_tokenizer(["a cat sat on the mat", "the dog ran", "Lily saw a dog"], 60).save(folder / "tokenizer")
    rows = [{"text": f"message {row}", "label": "spam" if row % 2 else "ham"} for row in range(12)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *(f"{row['text']},{row['label']}" for row in rows)]))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rows.json").write_text(json.dumps(rows))
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in ("text", "label")}), folder / "rows.parquet")
    pictures = draw.integers(0, 256, (12, 5, 4, 3), np.uint8)
    np.savez_compressed(folder / "pictures.npz", image=pictures, label=np.arange(12) % 2)
    for number, picture in enumerate(pictures[:6]):
        place = folder / "classes" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number}.{'png' if number < 5 else 'jpg'}")
    np.savez(
        folder / "series.npz",
        inputs=draw.normal(size=(12, 7, 2)),
        lengths=np.arange(12) % 7 + 1,
        label=np.arange(12) % 2,
    )
    steps = [f"{run},{t},{t * run},{run % 2}" for run in range(10) for t in range(3 + run % 3)]
    (folder / "steps.csv").write_text("\n".join(["id,time,speed,label", *steps]))
    edges = draw.integers(0, 12, (2, 40))
    masks = {f"{name}_mask": np.arange(12) % 3 == i for i, name in enumerate(("train", "val", "test"))}
    weights = {"edge_weight": np.ones(40, np.float32)}
    x = draw.normal(size=(12, 3)).astype(np.float32)
    np.savez(folder / "graph.npz", edge_index=edges, x=x, y=np.arange(12) % 3, **masks, **weights)
    matrix = scipy.sparse.csr_array((np.ones(40), edges), (12, 12))
    parts = {f"adj_{name}": np.asarray(getattr(matrix, name)) for name in ("data", "indices", "indptr", "shape")}
    np.savez(folder / "matrix.npz", labels=np.arange(12) % 3, attr_matrix=x, **parts)
    scipy.sparse.save_npz(folder / "scipy.npz", matrix)
    np.save(folder / "classes.npy", np.arange(12) % 3)
    (folder / "edges.csv").write_text("source,target,weight\n" + "\n".join(f"n{a},n{b},1" for a, b in edges.T if a < b))
    (folder / "people.csv").write_text("id,age,label\n" + "\n".join(f"n{i},{20 + i},{'xyz'[i % 3]}" for i in range(12)))


def adapter(folder: Path) -> Any:
    return load_lora(folder / "adapter", PARAMS, NAMES)[0], load_lora_modules(folder / "adapter", PARAMS, NAMES)


def tokens(folder: Path) -> Any:
    return effjax.load_tokenizer(folder / "tokenizer").encode(["the cat"], max_length=16).input_ids.values


def table(name: str, modality: str = "text", **columns: Any) -> Callable[[Path], Any]:
    return lambda folder: effjax.read_data(modality, folder / name, **columns)


def edges(folder: Path) -> Any:
    return graph_from_files(folder / "edges.csv", nodes=folder / "people.csv", undirected=True)


def scipy_graph(folder: Path) -> Any:
    return graph_from_files(folder / "scipy.npz", labels=folder / "classes.npy")


def model(name: str) -> Callable[[Path], Any]:
    return lambda folder: effjax.load_pretrained(folder / name).params


KINDS = {
    "safetensors": Kind("model/model.safetensors", model("model"), change_tensors),
    "config.json": Kind("model/config.json", model("model"), change_json),
    "shard index": Kind("shards/model.safetensors.index.json", model("shards"), change_json),
    "adapter_config.json": Kind("adapter/adapter_config.json", adapter, change_json),
    "adapter tensors": Kind("adapter/adapter_model.safetensors", adapter, change_tensors),
    "tokenizer.json": Kind("tokenizer/tokenizer.json", tokens, change_json),
    "csv": Kind("rows.csv", table("rows.csv"), change_cells),
    "json lines": Kind("rows.jsonl", table("rows.jsonl"), change_lines),
    "json": Kind("rows.json", table("rows.json"), change_json),
    "parquet": Kind("rows.parquet", table("rows.parquet"), change_parquet),
    "image npz": Kind("pictures.npz", table("pictures.npz", "image"), change_arrays),
    "png": Kind("classes/a/2.png", table("classes", "image"), None),
    "jpeg": Kind("classes/b/5.jpg", table("classes", "image"), None),
    "series npz": Kind("series.npz", table("series.npz", "sequence"), change_arrays),
    "series csv": Kind("steps.csv", table("steps.csv", "sequence"), change_cells),
    "graph npz": Kind("graph.npz", lambda folder: effjax.data.graph_data(folder / "graph.npz"), change_arrays),
    "graph matrix": Kind("matrix.npz", table("matrix.npz", "graph"), change_arrays),
    "scipy matrix": Kind("scipy.npz", scipy_graph, change_arrays),
    "graph tables": Kind("people.csv", edges, change_cells),
    "edge list": Kind("edges.csv", edges, change_cells),
}


def content(value: Any) -> str:
    """A number of what was read."""
    if hasattr(value, "facts") and value.facts is not None:
        return value.facts.fingerprint
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(value):
        digest.update(np.asarray(leaf).tobytes() if hasattr(leaf, "shape") else repr(leaf).encode())
    return digest.hexdigest()


def read(kind: Kind, folder: Path) -> tuple[str, Any]:
    """Outcome, and what was read or said."""
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = kind.load(folder)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        named = str(folder) in said or Path(kind.file).name in said
        outcome = "refused" if "\n" not in said and named else "SEVERAL LINES" if named else "UNNAMED"
        found = f"{type(error).__name__}: {said}"
    except BaseException as error:  # Rust's panics are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "OTHER ERROR", "".join(traceback.format_exception(error)[-3:])
    else:
        outcome = "loaded"
    return ("SLOW" if time.perf_counter() - begin > SLOW else outcome), found


def one(kind: Kind, folder: Path, valid: bytes, right: str, seed: int) -> tuple[str, Any]:
    """Mutate, read, and put the valid file back."""
    draw = random.Random(seed)
    path = folder / kind.file
    try:
        if kind.change is not None and draw.random() < 0.6:
            for _ in range(draw.choice((1, 1, 2))):
                try:
                    kind.change(path, draw)
                except Exception:  # the first of two changes left nothing that a second could change
                    break
        else:
            path.write_bytes(draw.choice(BYTES)(bytearray(path.read_bytes()), draw))
        outcome, found = read(kind, folder)
    finally:
        path.write_bytes(valid)
    if outcome == "loaded":
        outcome = "same" if content(found) == right else "other"
    return outcome, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="files to make, of all kinds together")
    parser.add_argument("--kind", choices=[*KINDS], help="of one kind only")
    parser.add_argument("--seed", type=int, default=0, help="of the first file")
    options = parser.parse_args()
    logging.disable()
    kinds = [options.kind] if options.kind else [*KINDS]
    counts: dict[str, collections.Counter] = {name: collections.Counter() for name in kinds}
    failures = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder)
        for name in kinds:
            kind = KINDS[name]
            valid = (folder / kind.file).read_bytes()
            outcome, found = read(kind, folder)
            if outcome != "loaded":
                raise SystemExit(f"{name}: the valid file is not read: {found}")
            right = content(found)
            for seed in range(options.seed, options.seed + math.ceil(options.count / len(kinds))):
                outcome, found = one(kind, folder, valid, right, seed)
                counts[name][outcome] += 1
                if outcome not in ("same", "other", "refused"):
                    failures += 1
                    print(f"{outcome}: {name}, seed {seed}: {found}"[-1500:], flush=True)
            print(f"{name}: {dict(counts[name])}", flush=True)
    total = sum(counts.values(), collections.Counter())
    columns = ("same", "other", "refused")
    print(f"\n| kind | {' | '.join(columns)} | failures |\n|---|{'---|' * 4}")
    for name, row in [*counts.items(), ("all", total)]:
        wrong = sum(count for outcome, count in row.items() if outcome not in columns)
        print(f"| {name} | {' | '.join(str(row[column]) for column in columns)} | {wrong} |")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
