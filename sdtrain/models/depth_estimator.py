"""Estimate the depth of pictures with a pretrained depth model of transformers."""

import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from sdtrain.errors import UserError, first_line
from sdtrain.models.hashes import part_hash
from sdtrain.models.pipeline_folder import DEPTH_ESTIMATOR, FEATURE_EXTRACTOR
from sdtrain.paths import HUB_ID
from sdtrain.weight_files import quiet_libraries

METRIC_MODELS = ("depth_pro", "glpn", "zoedepth")
"""Types of models whose output is a distance; that of the others is an inverse depth."""

NEAREST = 1e-3
"""Least distance, in the unit of the model, that is told from 0."""


class DepthEstimator:
    """A frozen depth model, such as DPT (Ranftl et al. 2021) or Depth Anything.

    Args:
        source: folder or id of the Hugging Face hub of the model with its image processor, or
            folder of a pipeline that has one.
        key: the configuration key that names the source, for errors.
        device: where the model runs.

    Raises UserError for a source that does not exist or holds no such model in safetensors.
    """

    def __init__(self, source: str, key: str, device: torch.device) -> None:
        self.key = key
        self.source = source
        path = Path(source)
        if not path.exists() and not HUB_ID.fullmatch(source):
            raise self._error("is neither a folder nor an id of the Hugging Face hub (OWNER/NAME)")
        model = processor = path
        if (path / DEPTH_ESTIMATOR).is_dir():
            model = path / DEPTH_ESTIMATOR
            processor = path / FEATURE_EXTRACTOR
        for folder, name in ((model, "config.json"), (processor, "preprocessor_config.json")):
            if path.exists() and not (folder / name).is_file():
                raise self._error(f"holds no depth model: it has no {name}")
        # transformers would ask on the terminal whether to run the source's own code.
        options = {"local_files_only": path.exists(), "trust_remote_code": False}
        try:
            with quiet_libraries():
                self.processor = AutoImageProcessor.from_pretrained(str(processor), **options)
                self.net = AutoModelForDepthEstimation.from_pretrained(
                    str(model), use_safetensors=True, dtype=torch.float32, **options
                )
        except Exception as error:  # transformers raises various classes for broken files
            raise self._error(f"holds no depth model to be read: {first_line(error)}") from error
        self.net.eval().requires_grad_(False).to(device)
        config = self.net.config
        self.is_metric = (
            config.model_type in METRIC_MODELS
            or getattr(config, "depth_estimation_type", "relative") == "metric"
        )

    @property
    def identity(self) -> str:
        """Hash of the weights."""
        return part_hash(self.net)

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Return the depth map of an RGB picture: grey, of its size, 255 nearest and 0 farthest.

        It is the inverse depth, scaled to all of 0..255; 0 everywhere if it is constant.
        """
        size = (picture.height, picture.width)
        inputs = self.processor(images=picture, return_tensors="pt").to(self.net.device)
        with torch.inference_mode():
            outputs = self.net(**inputs)
        function = self.processor.post_process_depth_estimation
        sizes: dict[str, Any] = {"target_sizes": [size]}
        if "source_sizes" in inspect.signature(function).parameters:
            sizes["source_sizes"] = [size]  # to cut off what the processor has padded
        inverse = function(outputs, **sizes)[0]["predicted_depth"].float()
        if self.is_metric:
            inverse = 1 / inverse.clamp(min=NEAREST)
        if not bool(inverse.isfinite().all()):
            raise self._error("estimates a depth that is not finite")
        spread = inverse.max() - inverse.min()
        scaled = (inverse - inverse.min()) / (spread if spread > 0 else 1)
        return Image.fromarray((scaled * 255).round().byte().cpu().numpy())

    def _error(self, problem: str) -> UserError:
        return UserError(
            problem,
            key=self.key,
            value=self.source,
            remedy=f"Set {self.key} to a depth model of transformers with its image processor, "
            "such as Intel/dpt-large.",
        )
