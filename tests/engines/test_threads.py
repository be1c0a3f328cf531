import pytest

from oneword.engines.errors import UsageError
from oneword.engines.threads import cpu_threads


@pytest.mark.parametrize(("value", "expected"), [("", 0), ("3", 3), ("4,2", 4), (" 2 ", 2)])
def test_the_environment_is_read_as_openmp_reads_it(monkeypatch: pytest.MonkeyPatch, value: str, expected: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)

    assert cpu_threads(None) == expected
    assert cpu_threads(7) == 7


def test_a_value_that_is_not_a_number_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "many")

    with pytest.raises(UsageError, match="OMP_NUM_THREADS is 'many', but must be a number such as 4"):
        cpu_threads(None)


@pytest.mark.parametrize("value", ["4097", "5000000", "9" * 5000, "-1"])
def test_more_threads_than_any_machine_has_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)

    with pytest.raises(UsageError, match=r"but must be a number such as 4, at most 4096: set it to one, or unset it$"):
        cpu_threads(None)


@pytest.mark.parametrize("threads", [-1, 4097])
def test_the_number_of_threads_is_checked(threads: int) -> None:
    with pytest.raises(UsageError, match=f"^threads is {threads}, but must be 0 to 4096: 0 is the backend's default$"):
        cpu_threads(threads)
