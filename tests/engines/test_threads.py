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
