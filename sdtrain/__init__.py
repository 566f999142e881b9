"""sdtrain trains noise predictors: the networks behind Stable Diffusion."""

__version__ = "0.1.0"
