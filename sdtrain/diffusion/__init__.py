"""Forward process, predictions, weightings, times, noise, objective, denoisers and guidance.

Needs torch only.
"""

from sdtrain.diffusion.denoiser import Denoise, Denoiser
from sdtrain.diffusion.density import Density
from sdtrain.diffusion.forward import add_noise
from sdtrain.diffusion.guidance import classifier_free, two_conditions
from sdtrain.diffusion.objective import Network, Objective, WeightingError
from sdtrain.diffusion.prediction import Prediction
from sdtrain.diffusion.times import Times
from sdtrain.diffusion.weighting import Weighting, output_weight

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
    "classifier_free",
    "output_weight",
    "two_conditions",
]
