import json
import runpy
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.core.cost import count_compiles
from effjax.core.errors import NoEffectWarning
from effjax.data.bucket_sampler import BucketSampler, plan_epoch
from effjax.data.pipeline import ResumableIterator, prefetch_to_device
from effjax.data.ragged import Ragged
from effjax.transformers.token_drop import token_drop_columns

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "tokendrop_bucketsampler"
SST2 = Path(__file__).resolve().parents[2] / "../shared/data/sst2/train.parquet"


STOP = np.where(np.arange(50) % 3, np.arange(50), -1)


def texts(n=300, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(2 + rng.geometric(0.12, n), longest)
    ids = Ragged(rng.integers(5, 50, lengths.sum()), np.concatenate([[0], np.cumsum(lengths)]))
    return {"input_ids": ids, "label": rng.integers(0, 3, n), "score": rng.random(n)}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# The plan of the paper's program


@pytest.mark.parametrize("name", ["buckets_cola_lengths", "buckets_rte_lengths", "buckets_synthetic_edges"])
def test_full_batches_are_those_of_the_papers_program(name):
    """Bucket by bucket as many full batches as the authors' program, for its edges, sizes and caps."""
    official = SimpleNamespace(**runpy.run_path(str(REFERENCE / "official.py")))
    with np.load(REFERENCE / f"{name}.npz") as reference:
        assert tuple(reference["bucket_keys"]) == official.BOUNDARIES
        assert tuple(reference["hw_caps"]) == official.BATCH_SIZES
        lengths, seed = reference["lengths"], int(reference["seed"])
        for epoch in range(3):
            members, offsets = (reference[f"epoch{epoch}/batch_{part}"] for part in ("members", "offsets"))
            theirs = np.split(members, offsets[1:-1])
            written_out = official.plan(lengths, epoch=epoch, seed=seed)
            assert [rows.tolist() for rows in theirs] == written_out
            ours = plan_epoch(
                lengths,
                epoch=epoch,
                seed=seed,
                boundaries=official.BOUNDARIES,
                batch_sizes=official.BATCH_SIZES,
                cap=official.cap(epoch),
            )
            bucket = np.searchsorted(official.BOUNDARIES, lengths)
            sizes = np.minimum(official.BATCH_SIZES, official.cap(epoch))
            assert full_batches([batch.rows for batch in ours], bucket, sizes) == full_batches(theirs, bucket, sizes)


def full_batches(groups, bucket, sizes):
    """How many batches each bucket fills from its own members."""
    alone = [bucket[rows[0]] for rows in groups if len(set(bucket[rows])) == 1]
    held = [len(rows) for rows in groups if len(set(bucket[rows])) == 1]
    found = np.bincount([b for b, n in zip(alone, held, strict=True) if n == sizes[b]], minlength=len(sizes))
    assert found.tolist() == (np.bincount(bucket, minlength=len(sizes)) // sizes).tolist()
    return found.tolist()


# The plan of static shapes

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=120)


@settings(deadline=None, max_examples=100)
@given(LENGTHS, st.integers(0, 9), st.sampled_from([None, 4, 8, 20]), st.booleans())
def test_a_plan_holds_every_example_once_in_its_bucket(lengths, epoch, cap, stratified):
    lengths, boundaries, sizes = np.array(lengths), (4, 9, 17, 30), (24, 12, 12, 4)
    labels = np.arange(len(lengths)) % 3 if stratified else None
    arguments = {
        "epoch": epoch,
        "seed": 5,
        "boundaries": boundaries,
        "batch_sizes": sizes,
        "cap": cap,
        "labels": labels,
    }
    plan = plan_epoch(lengths, **arguments)
    assert sorted(np.concatenate([batch.rows for batch in plan])) == list(range(len(lengths)))
    assert all(lengths[batch.rows].max() <= batch.length for batch in plan)
    assert sum(batch.valid < batch.size for batch in plan) <= 1
    shape_of = {length: size if cap is None else min(cap, size) for length, size in zip(boundaries, sizes, strict=True)}
    assert all(batch.size == shape_of[batch.length] for batch in plan)
    # Merged batches: fewer than one a bucket where sizes fall slowly; all others lie in one bucket.
    bucket = np.searchsorted(boundaries, lengths)
    alone = [batch for batch in plan if (boundaries[bucket[batch.rows].min()] == batch.length)]
    full = {length: int((bucket == i).sum()) // shape_of[length] for i, length in enumerate(boundaries)}
    assert all(sum(batch.length == length for batch in alone) >= count for length, count in full.items())
    again = plan_epoch(lengths, **arguments)
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(plan, again, strict=True))


def test_without_merging_every_bucket_has_its_rest():
    lengths = texts()["input_ids"].lengths
    arguments = {"epoch": 0, "seed": 0, "boundaries": (8, 16, 24, 40), "batch_sizes": (16, 16, 16, 16)}
    apart, merged = plan_epoch(lengths, **arguments, merge=False), plan_epoch(lengths, **arguments)
    assert sum(batch.valid < batch.size for batch in apart) == 4
    assert sum(batch.valid < batch.size for batch in merged) == 1
    bucket = np.searchsorted((8, 16, 24, 40), lengths)
    assert all(len(set(bucket[batch.rows])) == 1 for batch in apart)


def test_epochs_and_seeds_differ_and_batches_are_mixed():
    lengths = texts()["input_ids"].lengths
    plans = [
        plan_epoch(lengths, epoch=epoch, seed=seed, boundaries=(8, 16, 40), batch_sizes=(8, 8, 8))
        for epoch, seed in ((0, 0), (1, 0), (0, 1))
    ]
    rows = [np.concatenate([batch.rows for batch in plan]).tolist() for plan in plans]
    assert rows[0] != rows[1] != rows[2] != rows[0]
    order = [batch.length for batch in plans[0]]
    assert order != sorted(order) and order != sorted(order, reverse=True)  # noqa: PT018


# The sampler


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 150), st.integers(1, 7), st.sampled_from([8, 16, (8, 16, 32)]), st.sampled_from([1, 4]), st.data()
)
def test_invariants_of_a_run(n, max_shapes, cap, length_multiple, data):
    columns = texts(n, seed=n)
    if not isinstance(cap, int):
        max_shapes += 2
    settings = {"seed": 1, "epochs": 3, "max_shapes": max_shapes, "cap": cap, "length_multiple": length_multiple}
    settings |= {"tokens": 512, "multiple": 4}
    whole = BucketSampler(columns, process_index=0, process_count=1, **settings)
    assert len(whole.shapes) <= max_shapes
    assert len(list(whole)) == whole.total_steps == sum(whole.steps_per_epoch) == len(whole)
    assert {whole[i]["input_ids"].shape for i in range(len(whole))} == set(whole.shapes)
    assert {batch["input_ids"].shape for batch in whole.example_batches()} == set(whole.shapes)
    assert tuple(whole.use_of_shapes) == whole.shapes
    assert tuple(map(sum, zip(*whole.use_of_shapes.values(), strict=True))) == (len(whole), 3 * n)
    assert (
        whole.real_tokens
        == 3 * columns["input_ids"].values.size
        == sum(whole[i]["mask"].sum() for i in range(len(whole)))
    )
    assert sum(whole[i]["weight"].sum() for i in range(len(whole))) == 3 * n
    assert all(size % 4 == 0 and size * length <= 512 for size, length in whole.shapes)
    index = data.draw(st.integers(0, len(whole) - 1))
    for count in (2, 4):
        parts = [BucketSampler(columns, process_index=p, process_count=count, **settings)[index] for p in range(count)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert same(joined, whole[index])


def test_a_batch_holds_the_texts():
    columns = texts(50)
    columns["token_type_ids"] = Ragged(columns["input_ids"].values % 2, columns["input_ids"].offsets)
    columns["row"] = np.arange(50)
    columns["attention_mask"] = [[1] * length for length in columns["input_ids"].lengths]  # of a tokenizer
    data = BucketSampler(columns, seed=0, epochs=1, cap=16, pad_id=7)
    seen = []
    for batch in data:
        assert {name: array.dtype.name for name, array in batch.items()} == {
            **dict.fromkeys(("input_ids", "token_type_ids", "label", "row"), "int32"),
            **{"mask": "bool", "weight": "float32", "score": "float32"},
        }
        for i, row in enumerate(batch["row"]):
            if batch["weight"][i]:
                seen.append(int(row))
                mask = batch["mask"][i]
                ids = columns["input_ids"][row]
                assert batch["input_ids"][i][mask].tolist() == ids.tolist()
                assert batch["token_type_ids"][i][mask].tolist() == (ids % 2).tolist()
                assert mask.tolist() == [True] * len(ids) + [False] * (len(mask) - len(ids))
                assert batch["label"][i] == columns["label"][row]
            else:
                assert not batch["mask"][i].any()
                assert batch["label"][i] == batch["score"][i] == 0
            assert (batch["input_ids"][i][~batch["mask"][i]] == 7).all()
            assert (batch["token_type_ids"][i][~batch["mask"][i]] == 0).all()
    assert sorted(seen) == list(range(50))


def test_caps_grow_by_epoch():
    data = BucketSampler(texts(), seed=0, epochs=4, cap=(8, 16, 32), boundaries=(10, 40), tokens=1024, max_shapes=6)
    assert data.shapes == ((8, 10), (16, 10), (32, 10), (8, 40), (16, 40), (24, 40))
    assert data.steps_per_epoch[2] == data.steps_per_epoch[3] < data.steps_per_epoch[1] < data.steps_per_epoch[0]


def test_fitted_boundaries_pad_less_than_even_ones():
    columns = texts(2000)
    fitted = BucketSampler(columns, seed=0, epochs=1, max_shapes=5)
    even = BucketSampler(columns, seed=0, epochs=1, max_shapes=5, boundaries=(8, 16, 24, 32, 40))
    assert fitted.processed_tokens < even.processed_tokens
    assert len(fitted.shapes) == 5


def test_stratified_batches_have_the_classes_of_the_data():
    columns = texts(2000)
    entropies = [
        BucketSampler(columns, seed=0, epochs=1, max_shapes=4, stratify=by).label_entropy() for by in (None, "label")
    ]
    assert entropies[0]["data"] == entropies[1]["data"] == pytest.approx(np.log(3), abs=1e-2)
    assert entropies[1]["mean"] > entropies[0]["mean"]
    assert entropies[1]["data"] - entropies[1]["mean"] < 0.01 < entropies[0]["data"] - entropies[0]["mean"]
    assert entropies[0]["least"] <= entropies[0]["mean"]


# Dropped tokens: the data of an epoch


def test_columns_of_each_epoch():
    columns = texts(200)
    read = token_drop_columns(columns, STOP, seed=4)
    data = BucketSampler(read, seed=0, epochs=3, max_shapes=6)
    first, last = data[0], data[len(data) - 1]
    assert data.real_tokens == sum(len(read(epoch)["input_ids"].values) for epoch in range(3))
    assert data.real_tokens < 3 * len(columns["input_ids"].values)
    assert sum(batch["mask"].sum() for batch in data) == data.real_tokens
    assert same(data[0], first)
    assert same(data[len(data) - 1], last)
    other = BucketSampler(token_drop_columns(columns, STOP, seed=5), seed=0, epochs=3, max_shapes=6)
    with pytest.raises(ValueError, match="plan is"):
        other.set_state(data.get_state())


def test_columns_must_depend_on_the_epoch_alone():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"columns\(0\) returned other lengths than when the run was planned"):
        BucketSampler(lambda epoch: texts(20, seed=int(rng.integers(1000))), seed=0, epochs=3)
    with pytest.raises(ValueError, match=r"columns\(epoch\) holds \[20, 21\] rows"):
        BucketSampler(lambda epoch: texts(20 + epoch), seed=0, epochs=2)


# State


def test_resuming_continues_the_run():
    make = lambda **options: BucketSampler(texts(), seed=2, epochs=2, max_shapes=4, **options)
    data = make()
    assert isinstance(data, ResumableIterator)
    for _ in range(5):
        next(data)
    state = json.loads(json.dumps(data.get_state()))
    rest = list(data)
    resumed = make()
    resumed.set_state(state)
    assert all(same(a, b) for a, b in zip(rest, resumed, strict=True))
    half = make(process_index=1, process_count=2)
    half.set_state(state)
    assert same(next(half), {name: array[len(array) // 2 :] for name, array in rest[0].items()})
    with pytest.raises(StopIteration):
        next(data)


def test_a_foreign_state_is_refused():
    data = BucketSampler(texts(), seed=2, epochs=2, max_shapes=4)
    for columns, changes, words in [
        (texts(), {"seed": 3}, "seed is 2 in the state and 3 here"),
        (texts(), {"cap": 32}, r"caps is \[64, 64\] in the state and \[32, 32\] here"),
        (texts(), {"stratify": "label"}, "plan is"),
        (texts(seed=1), {}, "plan is"),
    ]:
        other = BucketSampler(columns, **{"seed": 2, "epochs": 2, "max_shapes": 4, **changes})
        with pytest.raises(ValueError, match=words):
            other.set_state(data.get_state())
    with pytest.raises(ValueError, match="is not a state of BucketSampler"):
        data.set_state({"next": 0})
    with pytest.raises(ValueError, match=r"state\['next'\]=10000 must be"):
        data.set_state({**data.get_state(), "next": 10000})


# Other libraries


def test_as_a_grain_source():
    import grain

    whole = BucketSampler(texts(), seed=0, epochs=2, max_shapes=4)
    halves = [
        BucketSampler(texts(), seed=0, epochs=2, max_shapes=4, process_index=p, process_count=2) for p in range(2)
    ]
    parts = [iter(grain.MapDataset.source(half).map(lambda batch: batch).to_iter_dataset()) for half in halves]
    assert all(isinstance(part, ResumableIterator) for part in parts)
    state = json.loads(json.dumps(parts[0].get_state()))
    for batch in whole:
        pair = [next(part) for part in parts]
        assert same({name: np.concatenate([half[name] for half in pair]) for name in batch}, batch)
    parts[0].set_state(state)
    assert same(next(parts[0]), halves[0][0])
    for part in parts:
        part.close()


def test_over_a_hugging_face_dataset():
    import datasets

    columns = texts(40)
    rows = {name: [row.tolist() for row in column] for name, column in columns.items()}
    rows["attention_mask"] = [[1] * len(row) for row in rows["input_ids"]]
    table = datasets.Dataset.from_dict(rows).select(range(3, 33)).shuffle(seed=0)
    data = BucketSampler(table, seed=0, epochs=1)
    plain = BucketSampler({name: table[name] for name in columns}, seed=0, epochs=1)
    assert len(data) == len(plain) > 0
    assert all(same(a, b) for a, b in zip(data, plain, strict=True))


def test_prefetch_and_threads_read_the_same():
    columns = texts(60)
    data = BucketSampler(token_drop_columns(columns, np.ones(50, int), seed=0), seed=0, epochs=3, max_shapes=3)
    expected = [data[i] for i in range(len(data))]
    found = {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({i: data[i] for i in range(k, len(data), 4)}))
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[i], batch) for i, batch in enumerate(expected))
    with prefetch_to_device(data) as ahead:
        assert all(same(jax.device_get(batch), want) for batch, want in zip(ahead, expected, strict=True))


# In a training step


@jax.jit
def loss_and_gradient(params, batch):
    def loss(params):
        words = params["embedding"][batch["input_ids"]] * batch["mask"][..., None]
        pooled = words.sum(1) / jnp.maximum(batch["mask"].sum(1), 1)[:, None]
        each = (pooled @ params["kernel"] - batch["score"]) ** 2
        return (batch["weight"] * each).sum() / batch["weight"].sum()

    return jax.value_and_grad(loss)(params)


def parameters():
    keys = jax.random.split(jax.random.key(0))
    return {"embedding": jax.random.normal(keys[0], (50, 4)), "kernel": jax.random.normal(keys[1], (4,))}


def test_no_compile_after_the_warm_up():
    data = BucketSampler(texts(), seed=0, epochs=2, max_shapes=4)
    params = parameters()
    loss_and_gradient.clear_cache()
    for batch in data.example_batches():
        loss_and_gradient(params, batch)
    assert loss_and_gradient._cache_size() == len(data.shapes) == 4
    with count_compiles() as log:
        losses = [float(loss_and_gradient(params, batch)[0]) for batch in data]
    assert log.count == 0, log.names
    assert np.isfinite(losses).all()


def test_padding_changes_no_gradient():
    columns = texts(13)
    params = parameters()
    # One batch of all rows: unpadded rows, dummy rows, and longer ones.
    plain, *others = (
        loss_and_gradient(params, BucketSampler(columns, seed=0, epochs=1, boundaries=bounds, cap=cap, multiple=1)[0])
        for bounds, cap in (((40,), 13), ((40,), 16), ((2, 60), 13))
    )
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, other)


# Real text, and bad input


@pytest.mark.skipif(not SST2.exists(), reason="the shared data folder is not here")
def test_sst2_costs_a_third_of_static_and_half_of_dynamic_padding():
    import pyarrow.parquet

    sentences = pyarrow.parquet.read_table(SST2, columns=["sentence"])["sentence"].to_pylist()
    lengths = np.array([min(len(sentence.split()) + 2, 64) for sentence in sentences])
    ids = Ragged(np.ones(lengths.sum(), int), np.concatenate([[0], np.cumsum(lengths)]))
    data = BucketSampler({"input_ids": ids}, seed=0, epochs=1)
    shuffled = np.random.default_rng(0).permutation(lengths)[: len(lengths) // 32 * 32].reshape(-1, 32)
    dynamic = np.sum(-(-shuffled.max(1) // 8) * 8) * 32
    assert 64 * len(lengths) > 3 * data.processed_tokens
    assert dynamic > 2 * data.processed_tokens
    assert data.processed_tokens < 1.2 * data.real_tokens


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({"label": np.zeros(3)}, {}, "lack 'input_ids'"),
        ({"input_ids": []}, {}, "hold no rows"),
        ({"input_ids": [[1], [], [2]]}, {}, "empty in 1 of 3 rows, the first at 1"),
        ({"input_ids": [[1], [2]], "label": np.zeros(3)}, {}, r"columns\['label'\] has 3 rows and 'input_ids' 2"),
        ({"input_ids": [[1], [2]], "label": ["a", "b"]}, {}, r"columns\['label'\] holds texts, such as 'a'"),
        ({"input_ids": [[1], [2]], "score": np.array([0.0, np.nan])}, {}, "expected finite"),
        ({"input_ids": [[1], [2]], "label": np.array([0, 2**40])}, {}, "does not fit int32"),
        ({"input_ids": [[1], [2]], "token_type_ids": [[0], [0, 0]]}, {}, "rows of other lengths"),
        (texts(), {"boundaries": (8, 16)}, "examples are longer than the last boundary 16; the longest, row"),
        (texts(), {"boundaries": ()}, "boundaries=.* must hold at least one"),
        (texts(), {"boundaries": (8, 20, 40), "max_shapes": 2}, "max_shapes=2, but .* 3 shapes"),
        (texts(), {"cap": (8, 16, 32), "max_shapes": 2, "epochs": 3}, "too few even for one boundary"),
        (texts(), {"cap": 60}, "cap=60 must be a multiple of multiple=8: 56"),
        (texts(), {"cap": 4}, "at least multiple=8 rows"),
        (texts(), {"cap": ()}, "holds no batch size"),
        (texts(), {"tokens": 100}, "A batch holds multiple=8 rows of the longest boundary"),
        (texts(), {"batch_sizes": (8,)}, "belong to boundaries"),
        (texts(), {"boundaries": (8, 40), "batch_sizes": (8, 16)}, "never rise with"),
        (texts(), {"stratify": "score"}, "Column 'score' must hold one class"),
        (texts(), {"multiple": 4, "process_index": 0, "process_count": 8, "cap": 4}, "does not divide among"),
        (texts(), {"epochs": 0}, "planned before the first one"),
    ],
)
def test_bad_input_is_named(columns, options, words):
    with pytest.raises(ValueError, match=words):
        BucketSampler(columns, **{"seed": 0, "epochs": 1, **options})


def test_idle_boundaries_are_told():
    with pytest.warns(NoEffectWarning, match="1 of the 3 rungs are never used"):
        BucketSampler(texts(), seed=0, epochs=1, boundaries=(16, 40, 64))
    with pytest.raises(IndexError, match="outside"):
        BucketSampler(texts(), seed=0, epochs=1)[1000]
