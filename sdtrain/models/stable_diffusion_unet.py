"""The UNet of Stable Diffusion: diffusers' UNet2DConditionModel, built from a config.json."""

from typing import ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdtrain.errors import UserError
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
        condition_channels: input channels beside those of x_t, for the conditions; set by sdtrain.
            Those that the weights lack are added with weights of 0, so that the network's output
            is at first what it was.

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
        condition_channels: int = 0,
    ) -> None:
        super().__init__()
        self.is_pretrained = weights is not None
        folder = find_folder(architecture, "model.unet.architecture")
        config = UNet2DConditionModel.load_config(folder, local_files_only=True)
        if weights is None:
            self.net = UNet2DConditionModel.from_config(config)
        else:
            self.net = _read_unet(weights, variant)
        channels = self.net.config.out_channels + condition_channels
        self.added_channels = channels - self.net.config.in_channels
        add_input_channels(self.net, channels)
        if gradient_checkpointing:
            self.net.enable_gradient_checkpointing()

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Predict [B, C, h, w] from x [B, C + K, h, w], timestep [B] and context [B, L, D].

        The prediction is float32, also of weights in half precision.
        """
        dtype = self.net.conv_in.weight.dtype
        output = self.net(x.to(dtype), timestep, encoder_hidden_states=context.to(dtype))
        return output.sample.float()


def add_input_channels(net: UNet2DConditionModel, count: int) -> None:
    """Let a UNet have `count` input channels; those it lacks are added last, with weights of 0.

    Raises UserError if it has more.
    """
    old = net.conv_in
    if old.in_channels == count:
        return
    if old.in_channels > count:
        raise UserError(
            f"has {old.in_channels} input channels, and only {count} are given to it",
            key="model.unet.weights",
            remedy="Choose the conditions that it was trained with: model/channels=[depth] for "
            "five channels, model/channels=[inpainting] for nine.",
        )
    new = nn.Conv2d(count, old.out_channels, old.kernel_size, padding=old.padding)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    net.conv_in = new
    net.register_to_config(in_channels=count)


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
