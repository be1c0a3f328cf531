"""The requests and the accounting of `benchmarks.traffic`, compared with counts made by hand."""

import itertools
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.arrivals import Order, open_loop, orders
from benchmarks.contenders import DENOISE, Meter, Run
from benchmarks.traffic import Clock, Log, Picture, Turn, drive, found_slot, own_times, p99, scripted, summary

SIZES = ((64, 64), (96, 64))


def test_a_seed_always_gives_the_same_requests_and_they_differ_from_each_other() -> None:
    first, again, other = (list(itertools.islice(orders(seed, SIZES), 300)) for seed in (1, 1, 2))

    np.testing.assert_equal([order.settings for order in first], [order.settings for order in again])
    assert [order.settings["prompt"] for order in first] != [order.settings["prompt"] for order in other]
    assert len({order.settings["prompt"] for order in first}) == len({order.settings["seed"] for order in first}) == 300
    assert [order.size for order in first[:4]] == [*SIZES, *SIZES]


def test_requests_cover_every_kind_and_count_their_work() -> None:
    requests = list(itertools.islice(orders(0, SIZES), 300))

    assert {order.pictures for order in requests} == {1, 2, 4}
    assert {order.branches for order in requests} == {1, 2}
    assert len({order.settings["sampler"] for order in requests}) == 8
    assert 50 <= sum("mask" in order.settings for order in requests) <= 100
    assert min(order.settings["steps"] for order in requests) < 6
    assert max(order.settings["steps"] for order in requests) > 45
    for order in requests:
        settings = order.settings
        assert order.steps == int(settings["steps"] * settings.get("strength", 1)) >= 1
        assert order.branches == (2 if settings["guidance_scale"] > 1 else 1)
        assert order.work == settings["num_images"] * order.steps * order.branches


def test_arrivals_are_in_order_and_add_up_to_the_requested_work() -> None:
    arrivals = open_loop(orders(3, SIZES), 1000, 10.0, seed=4)

    times = [when for when, _ in arrivals]
    assert times == sorted(times)
    assert times[-1] <= 10
    work = [order.work for _, order in arrivals]
    assert sum(work[:-1]) < 1000 <= sum(work)


@dataclass
class Ticks:
    """A clock that only `sleep` and the stub's turns advance."""

    time: float = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += 0.25

    def stopped(self) -> Any:
        return Clock().stopped()


@dataclass
class Stub:
    """A turn takes one second, half of it in the engine, and denoises the first `max_rows` pictures."""

    clock: Ticks
    max_rows: int = 2
    padding: int = 0
    meter: Meter = field(default_factory=Meter)
    backend: str = "stub"

    def __post_init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.ids = itertools.count()

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, order: Order) -> int:
        id = next(self.ids)
        self.rows += [[id, index, 0, order] for index in range(order.pictures)]
        return id

    def step(self) -> list[Any]:
        rows = self.rows[: self.max_rows]
        for row in rows:
            row[2] += 1
        branches = sum(row[3].branches for row in rows) + self.padding
        self.meter.runs.append(Run(DENOISE, 0.5, (8, 8), branches))
        self.meter.runs.append(Run("vae_decoder", 0.125))
        self.clock.time += 1
        self.rows = [row for row in self.rows if row[2] < row[3].steps]
        done = [SimpleNamespace(id=row[0], index=row[1]) for row in rows if row[2] == row[3].steps]
        return [SimpleNamespace(id=r[0], index=r[1], step=r[2], steps=r[3].steps) for r in rows] + done

    def cancel(self, id: int) -> None:
        self.rows = [row for row in self.rows if row[0] != id]


def order(pictures: int, steps: int, branches: int, size: tuple[int, int] = (64, 64)) -> Order:
    return Order({}, size, pictures, steps, branches)


def test_useful_branches_and_waits_are_those_counted_by_hand() -> None:
    # given two slots, turns of one second, and in order of arrival: a guided picture of two steps (turns 0-1 and 1-2),
    # two unguided ones of one step (the first in turn 1-2, the second waits for a slot until 2-3), and one while idle
    clock = Ticks()
    script = [(0.0, order(1, 2, 2)), (0.5, order(2, 1, 1)), (4.125, order(1, 1, 1))]

    # when
    log = drive(Stub(clock), scripted(script), 6.0, clock)

    # then
    assert [turn.useful for turn in log.turns] == [2, 2 + 1, 1, 1]
    assert [(turn.start, turn.end) for turn in log.turns] == [(0, 1), (1, 2), (2, 3), (4.25, 5.25)]
    pictures = list(log.pictures.values())
    assert [picture.first for picture in pictures] == [1, 2, 3, 5.25]
    assert [picture.last for picture in pictures] == [2, 2, 3, 5.25]
    assert [found_slot(log, picture) for picture in pictures] == [True, True, False, True]
    result = summary(log)
    assert result["wait_turns"] == 3  # the turn it arrived in, the one without a slot, and its own
    assert result["free_turns"] == 2
    assert result["wait_ms"] == 2500
    assert result["free_median_turns"] == 1.5
    assert result["branches_per_second"] == 7 / 5.25
    assert result["pictures_per_second"] == 4 / 5.25
    assert result["engine_share"] == 4 * 0.5 / 5.25
    assert result["other_share"] == 4 * 0.125 / 5.25


def test_pictures_that_never_start_count_as_waiting_until_the_end() -> None:
    clock = Ticks()
    log = drive(Stub(clock), scripted([(0.0, order(2, 100, 1)), (0.5, order(1, 1, 1))]), 3.0, clock)

    assert clock.now() == 6  # waits for as long as the phase took
    assert summary(log)["wait_ms"] == 5500


def test_rates_are_relative_to_the_same_calls_alone() -> None:
    # given two turns with one call each, N = 4 of which 3 are useful; alone, a call takes 0.9 of its time in the turn
    run = Run(DENOISE, 1.0, (8, 8), 4)
    log = Log(10.0, 2, [Turn(0, 2, 3, [run], [0.9]), Turn(2, 4, 3, [run])])
    log.pictures[0, 0] = Picture(0.0, order(1, 2, 1), first=2.0, last=4.0)

    result = summary(log)

    assert result["full_rate"] == pytest.approx(4 / 0.9)
    assert result["busy_rate"] == pytest.approx(3 / (4 / 0.9))
    assert result["rate"] == pytest.approx(6 / 4 / (4 / 0.9))
    assert result["overhead"] == pytest.approx((2 - 0.9) / 2)
    assert result["host"] == pytest.approx(0.5)


def test_turns_and_arrivals_before_the_start_are_not_measured() -> None:
    # given a slow first turn with one picture, then a fast one with another
    run = Run(DENOISE, 1.0, (8, 8), 2)
    log = Log(10.0, 2, [Turn(0, 6, 2, [run], [1.0]), Turn(6, 8, 2, [run], [1.0])])
    log.pictures[0, 0] = Picture(0.0, order(1, 1, 2), first=6.0, last=6.0)
    log.pictures[1, 0] = Picture(6.5, order(1, 1, 2), first=8.0, last=8.0)

    result = summary(log.after(6.0))

    assert (result["turns"], result["pictures"], result["turn_ms"]) == (1, 1, 2000)
    assert result["wait_ms"] == 1500
    assert result["branches_per_second"] == 2 / 2
    assert result["pictures_per_second"] == 1 / 2


def test_times_alone_are_interpolated_between_measured_numbers_of_branches() -> None:
    pairs = [(Run(DENOISE, 1.0, (8, 8), n), seconds) for n, seconds in ((2, 2.0), (4, 4.0), (4, 6.0), (4, 5.0))]
    own_time = own_times(pairs)

    assert [own_time(Run(DENOISE, 9.0, (8, 8), n)) for n in (1, 2, 3, 4, 5)] == [2, 2, 3.5, 5, 5]
    assert own_time(Run(DENOISE, 9.0, (8, 12), 2)) == 9  # this size was never measured


def test_p99_is_a_value_that_occurred() -> None:
    assert p99(range(1, 101)) == 99
    assert p99([3.0, 1.0]) == 3
    assert math.isnan(p99([]))
