import threading
from pathlib import Path

import pytest
import torch

from benchmarks.threads import BAR, measure, write_pictures
from oneword.train.parallel import Recorded, in_threads, parts_of


def test_only_a_batchs_size_and_the_threads_decide_how_it_is_divided() -> None:
    assert parts_of(range(16), 2) == [list(range(8)), list(range(8, 16))]
    assert parts_of(range(16), 64) == parts_of(range(16), 2)
    assert parts_of(range(15), 2) == [list(range(15))]  # parts of 7 and 8 would be too small
    assert [len(part) for part in parts_of(range(100), 3)] == [33, 33, 34]
    assert len(parts_of(range(1000), 64)) == 4
    assert parts_of(range(16), 1) == [list(range(16))]


def test_parts_run_at_once_with_their_share_of_the_threads_and_results_are_in_order() -> None:
    before, barrier = torch.get_num_threads(), threading.Barrier(2, timeout=60)

    def compute(part: str) -> tuple[str, int]:
        barrier.wait()
        return part, torch.get_num_threads()

    torch.set_num_threads(4)
    try:
        assert in_threads(compute, ["a", "b"]) == [("a", 2), ("b", 2)]
        assert in_threads(lambda part: (part, torch.get_num_threads()), ["a"]) == [("a", 4)]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


class Doubled(torch.nn.Module):
    """Doubles its first input and adds the third, if there is one; counts its calls."""

    calls = 0

    def forward(self, x: torch.Tensor, absent: torch.Tensor | None, y: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        return 2 * x if y is None else 2 * x + y


def test_a_recording_gives_the_modules_values_and_gradients_without_running_it() -> None:
    module = Doubled()
    recorded = Recorded(module)
    recorded.record(torch.zeros(3), None, torch.zeros(3))
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    before = module.calls

    y = recorded(x, None, torch.ones(3))
    y.sum().backward()

    assert module.calls == before
    assert y.tolist() == [3.0, 5.0, 7.0]
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_inputs_of_another_shape_or_variant_run_the_module_itself() -> None:
    module = Doubled()
    recorded = Recorded(module)
    recorded.record(torch.zeros(3), None, torch.zeros(3))
    before = module.calls

    recorded(torch.zeros(4), None, torch.zeros(4))
    recorded(torch.zeros(3), None, None)
    recorded.variant = "changed"
    recorded(torch.zeros(3), None, torch.zeros(3))

    assert module.calls == before + 3


class Refusing(Doubled):
    """Stands for a module with an operation that cannot be traced: it raises while it is recorded, and only then."""

    def forward(self, x: torch.Tensor, absent: torch.Tensor | None, y: torch.Tensor | None) -> torch.Tensor:
        if torch.jit.is_tracing():
            raise NotImplementedError("an operation that cannot be traced")  # on purpose: what the test is about
        return super().forward(x, absent, y)


def test_a_module_that_cannot_be_recorded_still_runs() -> None:
    recorded = Recorded(Refusing())
    recorded.record(torch.zeros(3), None, None)

    assert recorded(torch.ones(3), None, None).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.slow
def test_learning_beside_a_busy_process_takes_little_more_than_twice_as_long(tmp_path: Path) -> None:
    """Medians of five rounds of ten steps; needs an otherwise idle machine."""
    write_pictures(tmp_path)

    alone, beside = measure(tmp_path, rounds=5, steps=10, busy=1)

    assert beside["in parts"] <= BAR * alone["in parts"]
    assert alone["in parts"] <= 1.05 * alone["whole"]
