import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data.ragged import Ragged

SEQUENCES = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=8)


@settings(deadline=None, max_examples=40)
@given(SEQUENCES, st.data())
def test_every_operation_equals_its_loop(sequences, data):
    ragged = Ragged.of(sequences)
    assert len(ragged) == len(sequences)
    assert ragged.lengths.tolist() == [len(row) for row in sequences]
    assert [row.tolist() for row in ragged] == sequences
    assert ragged.rows.tolist() == [i for i, row in enumerate(sequences) for _ in row]
    assert ragged.positions.tolist() == [j for row in sequences for j in range(len(row))]
    rows = data.draw(st.lists(st.integers(0, len(sequences) - 1), max_size=5)) if sequences else []
    taken = ragged.take(rows)
    assert [taken[i].tolist() for i in range(len(rows))] == [sequences[i] for i in rows]
    assert ragged.pad(rows, 7, value=-1).tolist() == [sequences[i] + [-1] * (7 - len(sequences[i])) for i in rows]
    kept = np.asarray(
        data.draw(st.lists(st.booleans(), min_size=ragged.values.size, max_size=ragged.values.size)), bool
    )
    flags = iter(kept)
    assert list(map(list, map(ragged.keep(kept).__getitem__, range(len(ragged))))) == [
        [value for value in row if next(flags)] for row in sequences
    ]


def test_dtypes_and_views():
    ragged = Ragged.of([np.array([1, 2], np.uint16), [3]])
    assert (ragged.values.dtype, ragged.offsets.dtype, ragged.lengths.dtype) == (np.int32, np.int64, np.int32)
    assert np.shares_memory(ragged[0], ragged.values)
    assert ragged[-1].tolist() == [3]
    assert ragged.pad([], 4).shape == (0, 4)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"length=2: 1 of 2 rows are longer, the first is row 3 with 3"):
        Ragged.of([[1], [1], [1], [1, 2, 3]]).pad([0, 3], 2)
    with pytest.raises(ValueError, match=r"sequences\[1\] is <U1"):
        Ragged.of([[1], ["a"]])
    with pytest.raises(ValueError, match="2147483648, which does not fit int32"):
        Ragged.of([[2**31]])
    with pytest.raises(ValueError, match="offsets end at 2, but values holds 3"):
        Ragged(np.arange(3), np.array([0, 2]))
    with pytest.raises(ValueError, match="never fall"):
        Ragged(np.arange(3), np.array([0, 4, 3]))
    with pytest.raises(IndexError, match=r"index=2 is outside \[0, 1\]"):
        Ragged.of([[1], [2]])[2]
