"""The table of quality against steps: what is drawn, and which contender it recommends."""

from benchmarks.samplers import CONTENDERS, Contender, best, overall, summary
from oneword.runtime.samplers import Guidance, Sampler, make_schedule
from oneword.runtime.spacing import Spacing


def test_every_contender_can_be_drawn_with_as_many_evaluations_as_its_column_says() -> None:
    for contender in CONTENDERS:
        for evaluations in (5, 8, 12, 20):
            steps = contender.steps(evaluations)
            schedule = make_schedule(
                {},
                contender.sampler,
                steps,
                guidance_scale=0.6,
                spacing=contender.spacing,
                guidance=contender.guidance,
            )
            assert len(schedule) in (evaluations, evaluations - 1)


def test_the_best_mean_over_all_columns_is_recommended() -> None:
    euler, karras = Contender(Sampler.EULER), Contender(Sampler.EULER, Spacing.KARRAS)
    plus = Contender(Sampler.DDIM, guidance=Guidance.CFG_PP)
    results = {
        euler: {5: (0.8, 0.6), 20: (1.0, 0.8)},
        karras: {5: (0.9, 0.9), 20: (0.7, 0.6)},
        plus: {5: (0.1, 0.2), 20: (0.3, 0.4)},
    }

    assert overall(results[euler]) == 0.8
    assert best(results) == euler
    text = summary(results, 200, 4.0)
    assert "| `euler karras` | 90.0%, 90.0% | 70.0%, 60.0% | 77.5% |" in text
    assert "| `ddim cfg++` | 10.0%, 20.0% | 30.0%, 40.0% | 25.0% |" in text
    assert "Recommended on this model: `euler`; at 5 evaluations, `euler karras`." in text
    tentative = summary(results, 24, 4.0)
    assert "Recommended" not in tentative
    assert "With fewer than 200 captions none is recommended." in tentative
