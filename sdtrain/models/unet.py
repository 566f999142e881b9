"""The noise predictor: diffusers' UNet2DConditionModel, called with (x, timestep, context)."""

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdtrain.errors import UserError


class UNet(nn.Module):
    """A UNet with cross-attention at the resolutions of `attention`, like Stable Diffusion's.

    Args:
        latent_channels: channels of x_t and of the output.
        condition_channels: further input channels for a conditioner's maps; set by sdtrain.
        context_dim: width D of the conditioning sequence.
        block_channels: channels at each resolution, from the finest to the coarsest.
        layers_per_block: residual blocks at each resolution.
        attention: for each resolution, whether it has self- and cross-attention.
        head_dim: channels of an attention head.
        norm_groups: groups of the group norms; must divide every entry of block_channels.
        pooled_context: whether to add an attention-pooled context to the time embedding, beside the
            cross-attention (Saharia et al. 2022, section D.1). It carries what concerns the whole
            picture, such as a background's colour, to every pixel.

    Raises UserError if these do not fit together.
    """

    def __init__(
        self,
        *,
        latent_channels: int,
        context_dim: int,
        block_channels: list[int],
        layers_per_block: int,
        attention: list[bool],
        head_dim: int,
        norm_groups: int,
        pooled_context: bool,
        condition_channels: int = 0,
    ) -> None:
        super().__init__()
        if len(attention) != len(block_channels):
            raise UserError(
                f"model.unet.attention has {len(attention)} entries, "
                f"model.unet.block_channels {len(block_channels)}",
                key="model.unet.attention",
                remedy="Give one entry per resolution.",
            )
        for channels in block_channels:
            if channels % norm_groups or channels % head_dim:
                raise UserError(
                    f"model.unet.block_channels has {channels}: each must be a multiple of "
                    f"norm_groups={norm_groups} and of head_dim={head_dim}",
                    key="model.unet.block_channels",
                )
        down = []
        up = []
        for has_attention in attention:
            down.append("CrossAttnDownBlock2D" if has_attention else "DownBlock2D")
            up.insert(0, "CrossAttnUpBlock2D" if has_attention else "UpBlock2D")
        self.net = UNet2DConditionModel(
            in_channels=latent_channels + condition_channels,
            out_channels=latent_channels,
            cross_attention_dim=context_dim,
            block_out_channels=tuple(block_channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            norm_num_groups=norm_groups,
            resnet_time_scale_shift="scale_shift",
            addition_embed_type="text" if pooled_context else None,
            addition_embed_type_num_heads=max(1, context_dim // head_dim),
            # diffusers takes `attention_head_dim` as the number of heads, one entry per resolution,
            # as a comment in its source says.
            attention_head_dim=tuple(c // head_dim for c in block_channels),
        )

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Predict [B, C, h, w] from x [B, C + K, h, w], timestep [B] and context [B, L, D]."""
        return self.net(x, timestep, encoder_hidden_states=context).sample
