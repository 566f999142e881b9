"""Guidance wraps denoisers in a denoiser."""

import math
from collections.abc import Mapping

from torch import Tensor

from sdtrain.diffusion.denoiser import Denoise
from sdtrain.errors import UserError
from sdtrain.schedules import Schedule

CONDITIONED = "all"
"""Key of the denoiser that is told every condition."""

UNCONDITIONED = "none"
"""Key of the denoiser that is told none, or a negative prompt in its place."""


def classifier_free(
    denoisers: Mapping[str, Denoise],
    guidance_scale: float,
    schedule: Schedule,
    *,
    rescale: float = 0.0,
    log_snr_min: float | None = None,
    log_snr_max: float | None = None,
    max_std: float | None = None,
) -> Denoise:
    """x0 = x0_u + guidance_scale (x0_c - x0_u).

    Ho and Salimans 2022, eq. 6, in the convention of Stable Diffusion: 1 is no guidance. The
    formula for x0 equals the same formula for eps, because at one (x, t) the two differ by an
    affine map. At 0 and 1 only one network is asked, and its answer is passed on untouched (but for
    max_std). Raises UserError for an option outside its range.

    Args:
        denoisers: by what they are told: CONDITIONED gives x0_c, UNCONDITIONED x0_u.
        guidance_scale: weight of the difference that the condition makes.
        schedule: for the log_snr of a time.
        rescale: in [0, 1], how far the guided x0 of each picture is brought back to the standard
            deviation of its conditional x0 (Lin et al. 2024, eq. 15-16).
        log_snr_min, log_snr_max: outside of them there is no guidance and one network is asked
            (Kynkaanniemi et al. 2024). None: no bound.
        max_std: see `bounded`; None: no bound.
    """
    low = -math.inf if log_snr_min is None else log_snr_min
    high = math.inf if log_snr_max is None else log_snr_max
    if not 0 <= rescale <= 1:
        raise UserError("must lie in [0, 1]", key="guidance.rescale", value=rescale)
    if not low < high:
        raise UserError(
            f"must lie below guidance.log_snr_max={high:g}", key="guidance.log_snr_min", value=low
        )
    conditional = denoisers[CONDITIONED]
    unconditional = denoisers[UNCONDITIONED]

    def guided(x: Tensor, t: Tensor) -> Tensor:
        log_snr = schedule.log_snr(t).item()  # t is on the CPU: nothing waits for the device
        if not low <= log_snr <= high:
            return conditional(x, t)
        x0_u = unconditional(x, t)
        if guidance_scale == 0:
            return x0_u
        x0_c = conditional(x, t)
        x0 = x0_u + guidance_scale * (x0_c - x0_u)
        if not rescale:
            return x0
        wanted = x0_c.std((1, 2, 3), keepdim=True, correction=0)
        factor = wanted / x0.std((1, 2, 3), keepdim=True, correction=0)
        return x0 * (1 + rescale * (factor - 1))

    denoise = conditional if guidance_scale == 1 else guided
    return denoise if max_std is None else bounded(denoise, max_std)


def bounded(denoise: Denoise, max_std: float) -> Denoise:
    """Scales the x0 of a picture down to the standard deviation max_std, where it is larger.

    Near alpha = 0 the x0 read from a predicted eps is its error over alpha, thousands of times the
    size of any picture. Latents have unit variance and no fixed range, so it is their deviation
    that is bounded (after the dynamic thresholding of Saharia et al. 2022, section 2.3). Raises
    UserError for max_std <= 0.
    """
    if not max_std > 0:
        raise UserError("must be above 0", key="guidance.max_std", value=max_std)

    def within(x: Tensor, t: Tensor) -> Tensor:
        x0 = denoise(x, t)
        return x0 * (max_std / x0.std((1, 2, 3), keepdim=True, correction=0)).clamp(max=1)

    return within
