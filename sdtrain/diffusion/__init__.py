"""Forward process, predictions, weights, times, noise, the objective; denoisers and guidance.

Needs torch alone.
"""

from sdtrain.diffusion.denoiser import Denoise, Denoiser
from sdtrain.diffusion.density import Density
from sdtrain.diffusion.forward import add_noise
from sdtrain.diffusion.guidance import classifier_free
from sdtrain.diffusion.objective import Network, Objective, WeightingError
from sdtrain.diffusion.prediction import Prediction
from sdtrain.diffusion.times import Times
from sdtrain.diffusion.weighting import Weighting, charge

__all__ = [
    "Denoise",
    "Denoiser",
    "Density",
    "Network",
    "Objective",
    "Prediction",
    "Times",
    "Weighting",
    "WeightingError",
    "add_noise",
    "charge",
    "classifier_free",
]
