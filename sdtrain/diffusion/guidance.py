"""Guidance wraps denoisers in a denoiser."""

from torch import Tensor

from sdtrain.diffusion.denoiser import Denoise


def classifier_free(conditional: Denoise, unconditional: Denoise, guidance_scale: float) -> Denoise:
    """x0 = x0_u + guidance_scale (x0_c - x0_u) (Ho and Salimans 2022, eq. 6, in the convention of Stable Diffusion: 1 is no guidance).

    Said of x0 it equals the same formula said of eps, because at one (x, t) the two differ by an affine map. At 0 and 1 only one
    network is asked, and its answer is passed on untouched.
    """
    if guidance_scale == 1:
        return conditional
    if guidance_scale == 0:
        return unconditional

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        without = unconditional(x, t)
        return without + guidance_scale * (conditional(x, t) - without)

    return denoise
