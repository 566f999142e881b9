"""Forward process, predictions, weights, times, the objective; denoisers and guidance. Needs torch alone."""

from sdtrain.diffusion.denoiser import Denoise, Denoiser
from sdtrain.diffusion.forward import add_noise
from sdtrain.diffusion.guidance import classifier_free
from sdtrain.diffusion.objective import Network, Objective
from sdtrain.diffusion.prediction import Epsilon, Prediction
from sdtrain.diffusion.times import Uniform
from sdtrain.diffusion.weighting import Debiased, Simple, Weighting

__all__ = [
    "Debiased", "Denoise", "Denoiser", "Epsilon", "Network", "Objective", "Prediction", "Simple", "Uniform", "Weighting", "add_noise",
    "classifier_free",
]
