"""Routing: which channel a key belongs to must never change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.route import Keys, channel_of, channels_of, hash_keys, number_finder, split, text_finder

integers = st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=50).map(lambda some: np.array(some, np.int64))
texts = st.lists(st.text(max_size=10), max_size=50)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        pytest.param(0, 0xE220A8397B1DCDAF, id="0: the first number of splitmix64"),
        pytest.param(1, 0x910A2DEC89025CC1, id="1"),
        pytest.param(-1, 0xE4D971771B652C20, id="-1"),
        pytest.param((1 << 63) - 1, 0x2A67D7552E039EA7, id="the largest"),
        pytest.param("", 0, id="no text"),
        pytest.param("123456789", 0xCBF43926, id="the check value of CRC-32"),
        pytest.param("këy", 0x3AA02BBD, id="beyond ASCII: of its UTF-8"),
    ],
)
def test_hashes_stay_the_same(key: int | str, expected: int) -> None:
    """A row is looked for where it was put, by every later version, on every machine."""
    keys: Keys = np.array([key], np.int64) if isinstance(key, int) else [key]
    assert hash_keys(keys).tolist() == [expected]


@given(keys=integers | texts, ways=st.integers(1, 9))
def test_every_key_has_one_channel(keys: Keys, ways: int) -> None:
    """A split covers all rows, each once, in order; a key's channel does not depend on what else is in the batch."""
    parts = split(keys, ways)
    assert len(parts) == ways
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(keys)))
    for way, offsets in enumerate(parts):
        assert offsets.dtype == np.int64 and (np.diff(offsets) > 0).all()
        for offset in offsets.tolist():
            alone: Keys = keys[offset : offset + 1]
            assert [len(one) for one in split(alone, ways)].index(1) == way
            assert channel_of(keys[offset] if isinstance(keys, list) else int(keys[offset]), ways) == way
    assert channels_of(keys, ways).tolist() == [
        next(way for way, offsets in enumerate(parts) if offset in offsets) for offset in range(len(keys))
    ]


@given(keys=integers | texts, ways=st.sampled_from([1, 2, 3, 4, 8, 9, 16, 32, 64, 65, 100, 128, 1 << 20]))
def test_one_key_is_found_where_many_are(keys: Keys, ways: int) -> None:
    """A single look-up finds each key where a batch puts it, for few channels and many, a power of two or not."""
    channels = channels_of(keys, ways).tolist()
    if isinstance(keys, np.ndarray):
        assert list(map(number_finder(range(ways)), keys.tolist())) == channels
    else:
        assert list(map(text_finder(range(ways)), keys)) == channels


@pytest.mark.parametrize("ways", [2, 3, 8, 16])
def test_channels_are_about_equally_full(ways: int) -> None:
    """Keys that people use, numbers in order and numbered names, spread evenly: no channel has a tenth too much."""
    numbers = np.arange(20_000, dtype=np.int64)
    names = [f"user-{i}" for i in range(20_000)]
    for keys in (numbers, numbers * 1024, names):
        sizes = [len(one) for one in split(keys, ways)]
        assert max(sizes) < 1.1 * len(keys) / ways
