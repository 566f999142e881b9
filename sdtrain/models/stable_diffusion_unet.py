"""The UNet of Stable Diffusion: diffusers' UNet2DConditionModel, built from a config.json."""

from typing import ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdtrain.paths import find_folder
from sdtrain.weight_files import (
    DIFFUSERS,
    check_loaded,
    quiet_libraries,
    require_weight_files,
    weights_error,
)


class StableDiffusionUNet(nn.Module):
    """A UNet2DConditionModel with the architecture, and perhaps the weights, of a folder.

    Args:
        architecture: folder with the config.json of the UNet.
        weights: folder with its safetensors; None leaves the random initial weights.
        variant: "fp16" or "bf16" reads the files of that variant; None the first that exists.
        gradient_checkpointing: whether to compute activations again in the backward pass, which
            needs less memory and more time.

    Raises UserError if a folder does not exist or does not hold such a network.
    """

    kept_files: ClassVar[dict[str, tuple[str, ...]]] = {"architecture": ("config.json",)}

    def __init__(
        self,
        *,
        architecture: str,
        weights: str | None = None,
        variant: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.is_pretrained = weights is not None
        folder = find_folder(architecture, "model.unet.architecture")
        config = UNet2DConditionModel.load_config(folder, local_files_only=True)
        if weights is None:
            self.net = UNet2DConditionModel.from_config(config)
        else:
            self.net = _read_unet(weights, variant)
        if gradient_checkpointing:
            self.net.enable_gradient_checkpointing()

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Predict [B, C, h, w] from x [B, C, h, w], timestep [B] float and context [B, L, D]."""
        return self.net(x, timestep, encoder_hidden_states=context).sample


def _read_unet(weights: str, variant: str | None) -> UNet2DConditionModel:
    """Load a UNet from safetensors alone, in float32."""
    key = "model.unet.weights"
    folder = find_folder(weights, key)
    files = require_weight_files(folder, DIFFUSERS, key, variant)
    try:
        with quiet_libraries():
            net, info = UNet2DConditionModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                variant=files.variant,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # diffusers raises various classes for files that do not match
        raise weights_error(key, folder, error) from error
    check_loaded(info, key, folder)
    return net
