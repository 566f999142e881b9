"""Guidance combines a conditional and an unconditional denoiser into one."""

import math
from collections.abc import Mapping

from torch import Tensor

from sdtrain.diffusion.denoiser import Denoise
from sdtrain.errors import UserError
from sdtrain.schedules import Schedule

CONDITIONED = "all"
"""Key of the denoiser that is given every condition."""

UNCONDITIONED = "none"
"""Key of the denoiser that is given no caption or label, or a negative prompt instead. Of a model
with channel conditions, it is given those."""

NOTHING = "nothing"
"""Key of the denoiser that is given no channel condition either. It exists only for models that
have one."""


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

    Ho and Salimans 2022, eq. 6, in the convention of Stable Diffusion: a scale of 1 is no guidance.
    Guiding x0 is the same as guiding eps, because at a given (x, t) the two are related by an
    affine map. At scales 0 and 1 only one denoiser is evaluated, and its result is returned
    unchanged (except for max_std). Raises UserError for an option outside its range.

    Args:
        denoisers: CONDITIONED gives x0_c, UNCONDITIONED gives x0_u.
        guidance_scale: the weight of the difference that the condition makes.
        schedule: used to compute the log_snr of a time.
        rescale: in [0, 1], how far the guided x0 of each picture is brought back to the standard
            deviation of its conditional x0 (Lin et al. 2024, eq. 15-16).
        log_snr_min, log_snr_max: outside this range there is no guidance, and only the conditional
            denoiser is evaluated (Kynkaanniemi et al. 2024). None: no bound.
        max_std: see `with_bounded_std`; None: no bound.
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
        log_snr = schedule.log_snr(t).item()  # t is on the CPU, so this does not wait for the GPU
        if not low <= log_snr <= high:
            return conditional(x, t)
        x0_u = unconditional(x, t)
        if guidance_scale == 0:
            return x0_u
        x0_c = conditional(x, t)
        x0 = x0_u + guidance_scale * (x0_c - x0_u)
        if not rescale:
            return x0
        conditional_std = x0_c.std((1, 2, 3), keepdim=True, correction=0)
        factor = conditional_std / x0.std((1, 2, 3), keepdim=True, correction=0)
        return x0 * (1 + rescale * (factor - 1))

    denoise = conditional if guidance_scale == 1 else guided
    return denoise if max_std is None else with_bounded_std(denoise, max_std)


def two_conditions(
    denoisers: Mapping[str, Denoise],
    guidance_scale: float,
    schedule: Schedule,
    *,
    channel_scale: float,
    max_std: float | None = None,
) -> Denoise:
    """x0 = x0_0 + channel_scale (x0_k - x0_0) + guidance_scale (x0_c - x0_k).

    x0_0 is predicted without any condition, x0_k with the channel conditions alone, such as depth,
    and x0_c with the caption or label as well (Brooks et al. 2023, InstructPix2Pix, eq. 3). Each
    scale leaves the other condition as it is; two equal ones are guidance over both at once. At two
    scales of 1 only the last is evaluated, and its result is returned unchanged (except for
    max_std). Raises UserError for a model without channel conditions.

    Args:
        denoisers: NOTHING gives x0_0, UNCONDITIONED x0_k, CONDITIONED x0_c.
        guidance_scale: the weight of the difference that the caption or label makes.
        schedule: not used.
        channel_scale: the weight of the difference that the channel conditions make.
        max_std: see `with_bounded_std`; None: no bound.
    """
    if NOTHING not in denoisers:
        raise UserError(
            "guidance=two_conditions needs a model with a channel condition",
            key="guidance",
            remedy="Set guidance=classifier_free, or train with model/channels=[depth].",
        )
    conditional = denoisers[CONDITIONED]
    channels_only = denoisers[UNCONDITIONED]
    unconditional = denoisers[NOTHING]

    def guided(x: Tensor, t: Tensor) -> Tensor:
        x0_0 = unconditional(x, t)
        x0_k = channels_only(x, t)
        x0_c = conditional(x, t)
        return x0_0 + channel_scale * (x0_k - x0_0) + guidance_scale * (x0_c - x0_k)

    denoise = conditional if guidance_scale == channel_scale == 1 else guided
    return denoise if max_std is None else with_bounded_std(denoise, max_std)


def with_bounded_std(denoise: Denoise, max_std: float) -> Denoise:
    """Return a denoiser whose predicted x0 have a standard deviation of at most max_std each.

    An x0 with a larger standard deviation is scaled down to max_std. Near alpha = 0, an x0 computed
    from a predicted eps contains the prediction error divided by alpha, which can be thousands of
    times larger than the latents. Latents have no fixed range to clip to, but unit variance, so
    their standard deviation is bounded (compare dynamic thresholding, Saharia et al. 2022, section
    2.3). Raises UserError for max_std <= 0.
    """
    if not max_std > 0:
        raise UserError("must be above 0", key="guidance.max_std", value=max_std)

    def bounded(x: Tensor, t: Tensor) -> Tensor:
        x0 = denoise(x, t)
        return x0 * (max_std / x0.std((1, 2, 3), keepdim=True, correction=0)).clamp(max=1)

    return bounded
