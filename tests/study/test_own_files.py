"""Studies on files of one's own over the command line: a run per kind of data, and what bad input is told."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

from effjax.cli import main
from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_adjacency, gcn_normalize, loopless_adjacency
from effjax.recipes.spec import OwnData
from effjax.study import compare as compare_module
from effjax.study.own_files import as_flags
from effjax.study.resolve import resolve, resolve_saved
from effjax.tasks.graph import node_data

NODES = 60


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of one's own."""
    folder, draw = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    kinds = {"work": ["meeting", "report", "budget"], "home": ["dinner", "garden", "dog"]}
    rows = [
        (" ".join(draw.choice(words, draw.integers(1, 12))), kind, 7)
        for _ in range(40)
        for kind, words in kinds.items()
    ]
    _csv(folder / "messages.csv", ("body", "kind", "hour"), rows)
    _csv(folder / "scores.csv", ("body", "stars"), [(text, len(text) / 7) for text, _, _ in rows])
    _csv(folder / "single.csv", ("body", "kind"), [("alone", "odd"), *(row[:2] for row in rows)])
    _csv(folder / "empty.csv", ("body", "kind"), [*(row[:2] for row in rows), (" ", "home")])
    for name, red in (("cat", 0), ("dog", 120)):
        (folder / "pets" / name).mkdir(parents=True)
        (folder / "unlike" / name).mkdir(parents=True)
        for number in range(20):
            pixels = draw.integers(0, 100, (8, 8, 3)).astype(np.uint8) + np.array([red, 0, 0], np.uint8)
            Image.fromarray(pixels).save(folder / "pets" / name / f"{number}.png")
        for number in range(3):
            Image.new("RGB", (8, 8 + number)).save(folder / "unlike" / name / f"{number}.png")
    labels, lengths = np.arange(40) % 2, draw.integers(4, 13, 40)
    series = [draw.normal(2 * label - 1, 0.5, (length, 2)) for label, length in zip(labels, lengths, strict=True)]
    padded = np.stack([np.pad(one, ((0, 12 - len(one)), (0, 0))) for one in series])
    np.savez(folder / "runs.npz", inputs=padded, lengths=lengths, label=labels)
    steps = [(f"run{i}", t, *row, "ud"[labels[i]]) for i, one in enumerate(series) for t, row in enumerate(one)]
    _csv(folder / "runs.csv", ("run", "t", "a", "b", "label"), steps)
    _graphs(folder, draw)
    return folder


def _csv(path, head, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def _graphs(folder, draw):
    classes = np.arange(NODES) % 3
    pairs = [
        (i, j) for i in range(NODES) for j in range(i) if draw.random() < (0.3 if classes[i] == classes[j] else 0.02)
    ]
    edges = np.array([*pairs, *(pair[::-1] for pair in pairs)]).T
    features = np.eye(3, dtype=np.float32)[classes] + draw.normal(0, 0.3, (NODES, 3)).astype(np.float32)
    part = np.array(["train", "val", "test", "test", "test"])[np.arange(NODES) // 3 % 5]
    masks = {f"{name}_mask": part == name for name in ("train", "val", "test")}
    np.savez(folder / "graph.npz", edge_index=edges, x=features, y=classes, **masks)
    np.savez(folder / "beyond.npz", edge_index=np.array([[0, 1], [1, NODES]]), x=features, y=classes)
    order = np.lexsort(edges[::-1])
    starts = np.concatenate([[0], np.cumsum(np.bincount(edges[0], minlength=NODES))])
    rows = {"attr_indices": np.arange(NODES) % 3, "attr_indptr": np.arange(NODES + 1), "attr_shape": (NODES, 3)}
    matrix = {"adj_indices": edges[1][order], "adj_indptr": starts, "adj_shape": (NODES, NODES)}
    np.savez(folder / "benchmark.npz", **matrix, **rows, labels=classes)
    weights = {frozenset(pair): 1 + sum(pair) % 3 for pair in pairs}
    _csv(
        folder / "edges.csv",
        ("from", "to", "weight"),
        [(f"n{i}", f"n{j}", weights[frozenset((i, j))]) for i, j in edges.T],
    )
    nodes = [(f"n{i}", "abc"[classes[i]], part[i], *features[i]) for i in range(NODES)]
    _csv(folder / "nodes.csv", ("id", "label", "part", "x", "y", "z"), nodes)


MESSAGES = ["messages.csv", "--text", "body", "--label", "kind"]
TEXTS = [*("--max-length", "16", "--max-shapes", "2", "--model", "encoder-1x8", "--budget.amount", "1", "--seeds", "0")]
SERIES = ["--hidden", "4", "--batch-size", "8", "--budget.amount", "4"]
LABELLING = [
    *("--budget.amount", "4", "--budget.unit", "steps", "--hidden", "4", "--epochs-per-step", "2", "--samples", "2"),
    *("--calibration-epochs", "4", "--per-class", "3"),
]
NODE_TABLE = ["--nodes", "nodes.csv", "--node-split", "part"]
GEENI = [
    *("--hidden", "4", "--members", "2", "--modes", "full", "--fractions", "0.1", "--budget.amount", "10"),
    *("--train-per-class", "4", "--val-per-class", "4"),
]

RUNS = {
    "text": (
        [
            "bucket_sampler:smoke",
            "messages.csv",
            "--text",
            "body",
            "--label",
            "kind",
            *TEXTS,
            "--arms",
            "static",
            "buckets",
        ],
        ("Rows: 64 train, 16 test.", "2 classes: home (32 + 8), work (32 + 8).", "Not read: the columns 'hour'."),
    ),
    "score": (
        ["token_drop:smoke", "scores.csv", "--text", "body", "--score", "stars", *TEXTS, "--arms", "buckets"],
        ("Rows: 64 train, 16 test.", "the training rows 40 were used"),
    ),
    "image": (
        ["samuel:smoke", "pets", "--budget.amount", "10", "--batch-size", "8", "--arms", "sgd-0.1"],
        ("cat (16 + 4), dog (16 + 4)", "Images of 8 x 8 pixels and 3 channels."),
    ),
    "sequence": (
        ["irnn:smoke", "runs.csv", "--id", "run", "--time", "t", *SERIES, "--arms", "lstm"],
        ("d (16 + 4), u (16 + 4)", "2 features", "filled with zeros at the end to 12 steps"),
    ),
    "padded": (
        ["fptt:smoke", "runs.npz", *SERIES, "--alphas", "0.1", "--arms", "bptt"],
        ("0 (16 + 4), 1 (16 + 4)", "filled with zeros at the end to 12 steps"),
    ),
    "graph": (
        ["fastrain:smoke", "graph.npz", *LABELLING, "--arms", "shallow"],
        (f"Rows: {NODES} nodes", "The split is the files' own: 12 train, 12 val, 36 test nodes."),
    ),
    "benchmark": (
        ["geeni:smoke", "benchmark.npz", *GEENI, "--arms", "correct-smooth"],
        ("3 features per node", "4 and 4 nodes per class were drawn"),
    ),
    "edges": (
        ["fastrain:smoke", "edges.csv", *NODE_TABLE, "--source", "from", "--target", "to", *LABELLING, "--arms", "lp"],
        ("a (20), b (20), c (20)", "Edge weights from 1 to 3.", "12 train, 12 val, 36 test nodes"),
    ),
}
MORE = {"score": ["--train-rows", "40"]}


@pytest.mark.study
@pytest.mark.parametrize("kind", RUNS)
def test_a_study_runs_on_files_and_its_report_says_what_they_hold(kind, files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    (study, data, *words), said = RUNS[kind]
    assert main(["compare", study, "--data", data, *words, *MORE.get(kind, []), "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(arm["status"] == "ok" for arm in results["arms"].values())
    assert str(files / data) in results["environment"]["data"][0]
    paragraph = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("**Data**"))
    for fact in said:
        assert fact in paragraph
    assert "SHA-256" in paragraph


BAD = [
    (
        ["bucket_sampler", "messages.csv", "--text", "boddy", "--label", "kind"],
        "--text boddy is not a column",
        "'body'",
    ),
    (["bucket_sampler", "messages.csv", "--text", "body", "--label", "kid"], "--label kid is not a column", "'kind'"),
    (["bucket_sampler", "messages.csv", "--text", "body"], "Name it: --label COLUMN", "'kind'"),
    (["bucket_sampler", "messages.csv", "--text", "body", "--score", "kind"], "--score kind of", "holds 'work'"),
    (["bucket_sampler", "scores.csv", "--text", "body", "--label", "stars"], "no classes", "--score stars"),
    (["bucket_sampler", "single.csv", *MESSAGES[1:]], "class 'odd' has one row only", "(--test FILE)"),
    (["bucket_sampler", "empty.csv", *MESSAGES[1:]], "--text body of", "1 row (80;"),
    (
        ["bucket_sampler", *MESSAGES, "--split", "0.2", "--test", "messages.csv"],
        "--split 0.2 and --test",
        "one of them",
    ),
    (["bucket_sampler", *MESSAGES, "--split", "1.5"], "--split 1.5 must be", "(0, 1)"),
    (["bucket_sampler", *MESSAGES, "--train-rows", "99"], "--train-rows 99 must be", "[1, 64]"),
    (["bucket_sampler", *MESSAGES, "--size", "8", "8"], "--size is for image data", "--text, --text-b"),
    (["bucket_sampler", *MESSAGES, "--labels", "y.npy"], "--labels is for graph data", "Did you mean '--label'"),
    (
        ["bucket_sampler", *MESSAGES, "--lable", "kind"],
        "Unrecognized options: --lable",
        "Perhaps you meant: --label NAME",
    ),
    (["bucket_sampler", *MESSAGES, "--tasks", "sst2/minilm"], "--tasks together with --data", "Leave --tasks out"),
    (["bucket_sampler", *MESSAGES, "--model", "stories260k"], "--model stories260k is a Decoder", "encoder"),
    (
        ["bucket_sampler", *MESSAGES, "--model", "nowhere"],
        "--model nowhere is not like 'encoder-2x64'",
        "EFFJAX_MODELS",
    ),
    (["cola", *MESSAGES, "--model", "stories260k"], "--model stories260k is a decoder", "Give an encoder"),
    (["bucket_sampler", "mesages.csv", "--text", "body"], "mesages.csv is not a file or folder", "'messages.csv'"),
    (["bucket_sampler", *MESSAGES, "--test", "mesages.csv"], "--test ", "mesages.csv is not a file or folder"),
    (["samuel", "unlike"], "have 3 sizes", "Give --size 8 8"),
    (["samuel", "pets", "--model", "resnet21"], "--model resnet21 is not one of", "'resnet20'"),
    (["irnn", "runs.csv"], "Name it: --id COLUMN", "'run'"),
    (["irnn", "runs.csv", "--id", "run", "--time", "t", "--values", "a", "c"], "--values c is not a column", "'b'"),
    (
        ["irnn", "runs.npz", "--pad", "start", "--read", "mean"],
        "--read mean with --pad start: the mean",
        "Leave pad out",
    ),
    (["irnn", "runs.npz", "--batch-size", "99"], "--batch-size 99 must be", "32 rows"),
    (["fastrain", "beyond.npz"], f"below N={NODES} in 'edge_index'", f"it holds node {NODES}"),
    (["fastrain", "edges.csv"], "no classes", "--nodes FILE"),
    (["fastrain", "graph.npz", "--model", "gcn"], "--model gcn", "their own networks"),
    (["fastrain", "graph.npz", "--per-class", "1", "2"], "--per-class 1 2", "training nodes of its own"),
    (["fastrain", "benchmark.npz", "--per-class", "20"], "--per-class 20: no class", "smaller --per-class"),
    (["geeni", "benchmark.npz"], "--train-per-class 20 and --val-per-class 30", "smaller"),
    (["geeni", "graph.npz", "--leave-out", "val_mask"], "no validation nodes", "--leave-out"),
]


@pytest.mark.parametrize(("words", "first", "second"), BAD, ids=[" ".join(case[0][:2] + case[0][-2:]) for case in BAD])
def test_bad_input_names_the_option_and_the_way_out(words, first, second, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    study, data, *options = words
    assert main(["compare", f"{study}:smoke", "--data", data, *options, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err.partition("effjax: ")[2]
    assert first in message
    assert second in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "flag"), [(["--text", "body"], "--text"), (["--model", "minilm"], "--model")])
@pytest.mark.parametrize("verb", ["compare", "train"])
def test_an_option_without_data_is_refused(verb, words, flag, capsys):
    assert main([verb, "bucket_sampler:smoke", *words]) == 2
    assert f"{flag} is about data of your own. Give them with --data" in capsys.readouterr().err


def test_keywords_in_messages_become_options():
    assert as_flags("Give test=FILE; image='a b', alpha='keep' or split_seed=3.") == (
        "Give --test FILE; --image 'a b', --alpha keep or split_seed=3."
    )
    assert as_flags("size=(height, width), quotes=False, scale16=True: seed=1.") == (
        "--size height width, --no-quotes, --scale16: --split-seed 1."
    )
    # A word of another kind of data is somebody else's keyword.
    assert as_flags("source='nowhere': no folder", "text") == "--model nowhere: no folder"
    assert as_flags("train_rows=9", "text", ("train_rows",)) == "--train-rows 9"


def test_help_lists_every_option_and_what_each_study_takes(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    printed = capsys.readouterr().out
    for word in ("--data PATH", "--text-b NAME", "--size HEIGHT WIDTH", "--split-seed N", "--which-split N"):
        assert word in printed
    for stem, modality in (("samuel", "image"), ("cola", "text"), ("fptt", "sequence"), ("geeni", "graph")):
        assert any(line.split()[:1] == [stem] and f"--data: {modality}" in line for line in printed.splitlines())


def own(path, model=None, **columns):
    return OwnData(path=str(path), model=model, columns=tuple(columns.items()))


def test_a_config_with_data_of_ones_own_comes_back(files):
    study = resolve("samuel:smoke", ["--seeds", "3"], own(files / "pets", "cnn", size=(8, 8), split=0.5))
    assert study.config.tasks == ("pets/cnn",)
    assert resolve_saved("samuel", "smoke", json.loads(json.dumps(study.config_dict))) == study
    assert study.default_out != resolve("samuel:smoke", ["--seeds", "3"], own(files / "unlike", "cnn")).default_out


def test_all_rows_count_unless_the_user_says_otherwise(files):
    data = own(files / "messages.csv", text="body", label="kind")
    assert resolve("bucket_sampler:smoke").config.train_rows == 2000
    assert resolve("bucket_sampler:smoke", [], data).config.train_rows is None
    assert resolve("bucket_sampler:smoke", ["--train-rows", "7"], data).config.train_rows == 7


def test_names_of_built_in_sets_mean_nothing_for_ones_own(tmp_path):
    _csv(tmp_path / "digits.csv", ("text", "label"), [(f"word{i}", i % 2) for i in range(8)])
    study = resolve("cola", [], own(tmp_path / "digits.csv"))
    assert study.preset == "text"
    assert study.metrics["digits-minilm"]["name"] == "accuracy"
    assert study.config.data("digits", "text").facts.rows == {"train": 6, "test": 2}


def test_labelled_and_test_nodes_are_those_of_the_files(files):
    """FASTRAIN trains on the training mask for every seed, and judges on the test mask alone."""
    study = resolve("fastrain:smoke", ["--hidden", "4"], own(files / "graph.npz"))
    (group,) = study.groups()
    loaded = group.load()
    with np.load(files / "graph.npz") as stored:
        masks, truth = {name: stored[f"{name}_mask"] for name in ("train", "val", "test")}, stored["y"]
    for seed in (0, 1):
        np.testing.assert_array_equal(loaded.drawn(jax.random.key(seed)), masks["train"])
    assert loaded.labelled == masks["train"].sum()
    np.testing.assert_array_equal(np.asarray(loaded.problem.labels) >= 0, ~masks["val"])
    program = next(arm for arm in group.arms if arm.name == "lp").build(loaded)
    state = program.init(jax.random.key(0))
    guess = np.where(masks["test"], truth, (truth + 1) % 3)  # right on test nodes, wrong elsewhere
    assert program.evaluate({**state, "scores": jax.nn.one_hot(guess, 3)}) == {"accuracy": 1.0}


def test_geeni_takes_the_split_of_the_files(files):
    words = ["--hidden", "4", "--members", "2", "--budget.amount", "2", "--modes", "full"]
    loaded = resolve("geeni:smoke", words, own(files / "graph.npz", leave_out=("test_mask",))).groups()[0].load()
    with np.load(files / "graph.npz") as stored:
        np.testing.assert_array_equal(loaded.data.train, np.flatnonzero(stored["train_mask"]))
        np.testing.assert_array_equal(loaded.data.test, np.flatnonzero(stored["test_mask"]))  # all the others


def test_labels_spread_along_weighted_edges():
    senders, receivers = np.array([0, 1, 1, 2, 2, 0]), np.array([1, 0, 2, 1, 0, 2])
    weights = np.array([2.0, 2.0, 0.5, 0.5, 7.0, 7.0])
    matrix = gcn_adjacency(senders, receivers, 3, weights=weights)
    dense = np.zeros((3, 3))
    dense[receivers, senders] = weights
    degree = dense.sum(1)
    np.testing.assert_allclose(
        loopless_adjacency(matrix).todense(), dense / np.sqrt(degree[:, None] * degree), rtol=1e-5
    )
    with pytest.raises(ValueError, match="3 nodes with edges have no self-loop"):
        loopless_adjacency(gcn_normalize(adjacency(senders, receivers, 3, weights=weights)))


def test_edge_weights_of_a_file_reach_the_labels_that_spread(files):
    from effjax.data.files import read_data

    columns = {"nodes": files / "nodes.csv", "source": "from", "target": "to", "node_split": "part"}
    graph = node_data(read_data("graph", files / "edges.csv", **columns))
    plain = node_data(read_data("graph", files / "edges.csv", **columns, leave_out=("weight",)))
    spread = lambda data: np.asarray(loopless_adjacency(data.adjacency).todense())
    expected = np.zeros((NODES, NODES))
    expected[graph.data.receivers, graph.data.senders] = 1 + (graph.data.receivers + graph.data.senders) % 3
    degree = np.maximum(expected.sum(1), 1e-9)
    np.testing.assert_allclose(spread(graph), expected / np.sqrt(degree[:, None] * degree), rtol=1e-5)
    assert np.abs(spread(graph) - spread(plain)).max() > 0.05


@pytest.mark.study
def test_changed_files_are_no_continuation(files, tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "mine.csv", tmp_path / "out"
    text = (files / "messages.csv").read_text()
    path.write_text(text)
    words = [
        *("compare", "bucket_sampler:smoke", "--data", str(path), *MESSAGES[1:], *TEXTS),
        *("--arms", "static", "--out", str(out)),
    ]

    def killed(*_):
        raise SystemExit(75)

    with monkeypatch.context() as patch:
        patch.setattr(compare_module._Comparison, "_train", killed)
        with pytest.raises(SystemExit):
            main(words)
    path.write_text(text + "one more,work,7\n")
    assert main(words) == 2
    assert "was begun on other data" in capsys.readouterr().err
    path.write_text(text)
    assert main(words) == 0
    assert main(words) == 0  # finished, and still the same
    path.write_text(text + "one more,work,7\n")
    assert main(words) == 2
    assert "mine.csv has changed" in capsys.readouterr().err


@pytest.mark.study
def test_train_and_export_take_it_too(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    words = [
        *("train", "samuel:smoke", "--data", "pets", "--budget.amount", "4", "--batch-size", "8", "--model", "mlp-4"),
        *("--arm", "pets-mlp-4-shift/sgd-0.1", "--out", str(tmp_path / "run")),
    ]
    assert main(words) == 0
    monkeypatch.chdir(tmp_path)  # the files are found from elsewhere
    assert main(["export", "run", "--out", "w.safetensors"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tensors"] == 4
