"""Flow-matching schedules from a diffusers scheduler's config: alpha = 1 - sigma. Pure arrays, as `runtime.schedule`.

Not covered, and refused by name: linear time shifts, a terminal shift, inverted, Karras, exponential and beta sigmas,
and stochastic sampling.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from oneword.engines.errors import UsageError
from oneword.runtime.schedule import Array, ScheduleKind, check_types, explicit_settings

FINEST_STEPS: Final = 200
"""The steps for which FLUX.2's shift equals that of FLUX.1 dev; learning shifts by it."""
_MUST_BE: Final[dict[str, tuple[Any, ...]]] = {
    "prediction_type": ("flow_prediction",),
    "time_shift_type": ("exponential",),
    "shift_terminal": (None, 0),
    "invert_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "stochastic_sampling": (False, None),
    "thresholding": (False, None),
    "final_sigmas_type": ("zero", None),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
}


@dataclass(frozen=True)
class FlowSchedule:
    """The part of a flow scheduler's config that samplers need, for pictures of one size. A missing key has diffusers'
    default."""

    image_tokens: int
    """Tokens of a picture in the network, (h / patch) (w / patch): a dynamic shift depends on it."""
    even: bool = False
    """Whether the sigmas of `sigmas` are even from 1 to 1 / S before the shift, as in FluxPipeline."""
    empirical: bool = False
    """Whether a dynamic shift is that of Flux2KleinPipeline, which depends on the number of steps too."""
    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    """Whether the shift depends on the picture's size, by the four numbers below."""
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    algorithm_type: str = "dpmsolver++"
    lower_order_final: bool = True
    euler_at_final: bool = False
    prediction_type: ClassVar[str] = "flow_prediction"
    final_sigmas_type: ClassVar[str] = "zero"

    @classmethod
    def read(cls, config: Mapping[str, Any], kind: ScheduleKind, image_tokens: int) -> "FlowSchedule":
        """Reads a scheduler's config, verbatim. Raises UsageError that names a key whose value is not supported."""
        explicit = explicit_settings(config, _MUST_BE)
        names = {field.name for field in dataclasses.fields(cls)} - {"image_tokens", "even", "empirical"}
        fields = {key: explicit[key] for key in names if explicit.get(key) is not None}
        if "flow_shift" in explicit:  # its name in DPMSolverMultistepScheduler
            fields["shift"] = explicit["flow_shift"]
        check_types(cls, fields)
        schedule = cls(image_tokens, kind is not ScheduleKind.FLOW, kind is ScheduleKind.FLOW_EMPIRICAL, **fields)
        if schedule.base_image_seq_len == schedule.max_image_seq_len:
            raise UsageError(
                "the scheduler's config has equal base_image_seq_len and max_image_seq_len: they must differ"
            )
        return schedule

    def sigmas(self, steps: int) -> Array:
        """Sigmas [S] of FlowMatchEulerDiscreteScheduler, from 1. Without `even` the lowest is that of training, which
        is already shifted if the shift is static: the shift acts on it twice, as in diffusers."""
        lowest = 1 / self.num_train_timesteps
        if self.even:
            lowest = 1 / steps
        elif not self.use_dynamic_shifting:
            lowest = float(self.shifted(np.array(lowest)))
        return self.shifted(np.linspace(1, lowest, steps), steps)

    def sigmas_dpm(self, steps: int) -> Array:
        """Sigmas [S] of DPMSolverMultistepScheduler with `use_flow_sigmas`, which start slightly below 1."""
        return self.shifted(1 - np.linspace(1, 1 / self.num_train_timesteps, steps + 1), steps)[:0:-1]

    def shifted(self, sigmas: Array, steps: int = FINEST_STEPS) -> Array:
        """Shifts sigmas: s -> a s / (1 + (a - 1) s), section 5.3.2 of arXiv 2403.03206. A dynamic shift is a = e^mu,
        with mu linear in `image_tokens`, and for FLUX.2 in `steps`."""
        factor = self.shift
        if self.use_dynamic_shifting and self.empirical:
            factor = math.exp(empirical_mu(self.image_tokens, steps))
        elif self.use_dynamic_shifting:
            slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
            factor = math.exp(self.base_shift + slope * (self.image_tokens - self.base_image_seq_len))
        return np.asarray(factor * sigmas / (1 + (factor - 1) * sigmas))


def empirical_mu(image_tokens: int, steps: int) -> float:
    """FLUX.2's shift: linear in the steps through its values at 10 and at 200, which are linear in the picture's
    tokens; for pictures of more than 4,300, that of 200 steps.

    Source: compute_empirical_mu in diffusers' Flux2KleinPipeline.
    """
    finest = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return finest
    coarsest = 8.73809524e-05 * image_tokens + 1.89833333
    return finest + (coarsest - finest) * (FINEST_STEPS - steps) / (FINEST_STEPS - 10)
