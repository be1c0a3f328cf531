"""What is used again stays in the cache, whatever passes through it once."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from oneword.runtime.reuse_cache import ReuseCache

Bytes: TypeAlias = npt.NDArray[np.uint8]


def arrays(size: int = 1) -> Bytes:
    return np.zeros(size, np.uint8)


def held(cache: ReuseCache[Bytes], keys: Sequence[str]) -> str:
    return "".join(key for key in keys if key in cache)


def test_the_value_used_longest_ago_leaves_first() -> None:
    cache = ReuseCache[Bytes](3, 100)
    for key in "abcd":
        cache.put(key, arrays())

    assert held(cache, "abcd") == "bcd"
    assert cache.get("a") is None


def test_values_used_once_leave_before_those_used_again() -> None:
    cache = ReuseCache[Bytes](4, 100)
    value = arrays()
    cache.put("a", value)
    assert cache.get("a") is value
    for key in "bcdefgh":
        cache.put(key, arrays())

    assert held(cache, "abcdefgh") == "afgh"


def test_at_most_three_quarters_are_protected_so_that_new_values_have_room() -> None:
    cache = ReuseCache[Bytes](4, 100)
    for key in "abcd":
        cache.put(key, arrays())
        cache.get(key)
    cache.put("e", arrays())
    cache.put("f", arrays())

    assert held(cache, "abcdef") == "bcdf"


def test_values_leave_until_their_bytes_fit_and_one_that_is_too_large_is_alone() -> None:
    cache = ReuseCache[Bytes](10, 100)
    cache.put("a", arrays(40))
    cache.put("b", arrays(40))
    cache.get("a")
    cache.put("c", arrays(40))

    assert held(cache, "abc") == "ac"

    cache.put("d", arrays(1000))

    assert held(cache, "abcd") == "d"
    cache.put("e", arrays(1))
    assert held(cache, "de") == "e"

    cache.clear()
    cache.put("f", arrays(100))

    assert held(cache, "ef") == "f"


def test_a_word_that_is_replaced_all_the_time_pushes_out_no_other_prompt() -> None:
    cache = ReuseCache[Bytes](256, 1 << 20)
    rng = np.random.default_rng(0)
    for prompt in range(100):
        cache.put(f"plain {prompt}", arrays())
    found = []
    for version in range(5000):
        prompt = f"plain {rng.integers(100)}"
        found.append(cache.get(prompt) is not None)
        if not found[-1]:
            cache.put(prompt, arrays())
        cache.put(f"version {version}", arrays())

    assert np.mean(found[1000:]) == 1
