"""Condition on a caption with a pretrained CLIP text encoder, as Stable Diffusion does."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtrain.conditioning.interface import Conditioner, Conditioning, Inputs
from sdtrain.conditioning.new_words import words_of
from sdtrain.conditioning.tokens import Tokenize
from sdtrain.errors import UserError, first_line
from sdtrain.paths import find_folder
from sdtrain.weight_files import (
    FROZEN_DTYPES,
    TRANSFORMERS,
    check_loaded,
    quiet_libraries,
    require_weight_files,
    weights_error,
)


class Clip(Conditioner):
    """A CLIP text model (Radford et al. 2021, section 2.4) with the architecture of a folder.

    context [B, L, D] is its last hidden state, or an earlier one after the final layer norm. A
    dropped caption is replaced by the empty one, so the unconditional context is that of the empty
    prompt. Captions are padded as the tokenizer's folder says, and truncated to the length of the
    text model (77 tokens).

    Args:
        architecture: folder with the config.json of the text model.
        tokenizer: folder of its tokenizer.
        weights: folder with its safetensors; None leaves the random initial weights.
        variant: "fp16" or "bf16" reads the files of that variant; None the first that exists.
        trained: whether it is trained with the UNet; otherwise it is frozen.
        clip_skip: number of the last layers that are left out.
        dtype: "fp16" or "bf16" keeps a frozen text model in half precision; the context is float32.

    Raises UserError if a folder does not exist or does not hold such a model, or clip_skip leaves
    no layer.
    """

    reads = frozenset({"caption"})
    takes_context = True
    kept_files: ClassVar[dict[str, tuple[str, ...]]] = {
        "architecture": ("config.json",),
        "tokenizer": ("*.json", "*.txt"),
    }

    def __init__(
        self,
        *,
        architecture: str,
        tokenizer: str,
        weights: str | None = None,
        variant: str | None = None,
        trained: bool = False,
        clip_skip: int = 0,
        dtype: Literal["fp16", "bf16"] | None = None,
    ) -> None:
        super().__init__()
        folder = find_folder(architecture, "model.conditioner.architecture")
        try:
            config = CLIPTextConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises various classes for wrong values
            raise weights_error("model.conditioner.architecture", folder, error) from error
        layers = config.num_hidden_layers
        if not 0 <= clip_skip < layers:
            raise UserError(
                f"must lie between 0 and {layers - 1}: the text encoder has {layers} layers",
                key="model.conditioner.clip_skip",
                value=clip_skip,
            )
        tokenizer_folder = find_folder(tokenizer, "model.conditioner.tokenizer")
        self.tokenizer = _read_tokenizer(tokenizer_folder)
        if len(self.tokenizer) > config.vocab_size:
            raise UserError(
                f"has a tokenizer of {len(self.tokenizer)} tokens, but a text encoder with "
                f"vocab_size={config.vocab_size}",
                key="model.conditioner.tokenizer",
                value=str(tokenizer_folder),
                remedy="Set model.pretrained or model.architecture to a folder whose parts belong "
                "together.",
            )
        self.frozen = not trained
        self.clip_skip = clip_skip
        self.context_dim = config.hidden_size
        self.max_length = config.max_position_embeddings
        self.tokenize = Tokenize(self.tokenizer, self.max_length, words_of(self.tokenizer))
        self.sha256 = None
        if weights is None:
            self.net = CLIPTextModel(config)
        else:
            self.net, self.sha256 = _read_text_model(weights, variant)
        if self.frozen:
            self.net.to(getattr(torch, FROZEN_DTYPES[dtype]))

    @property
    def max_tokens(self) -> int:
        return self.max_length

    @property
    def tokens_key(self) -> str:
        return self.tokenize.key

    def count_truncated(self, captions: Sequence[str]) -> int:
        return self.tokenize.count_truncated(captions)

    def forward(self, inputs: Inputs) -> Conditioning:
        if self.frozen and inputs.context is not None:
            return Conditioning(context=inputs.context)
        return Conditioning(context=self._context(self.tokenize.of_inputs(inputs)))

    def _context(self, tokens: Tensor) -> Tensor:
        """Return the hidden state [B, L, D] of tokens [B, L]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if not self.clip_skip:
                return self.net(input_ids=tokens).last_hidden_state.float()
            states = self.net(input_ids=tokens, output_hidden_states=True).hidden_states
            return self.net.final_layer_norm(states[-1 - self.clip_skip]).float()


def _read_tokenizer(folder: Path) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises various classes for broken files
        raise UserError(
            f"holds no CLIP tokenizer that can be read: {first_line(error)}",
            key="model.conditioner.tokenizer",
            value=str(folder),
            remedy="Set model.pretrained, or model.conditioner.tokenizer, to another folder.",
        ) from error


def _read_text_model(weights: str, variant: str | None) -> tuple[CLIPTextModel, str]:
    """Load a text model from safetensors alone, in float32; return it and the hash of the files."""
    key = "model.conditioner.weights"
    folder = find_folder(weights, key)
    files = require_weight_files(folder, TRANSFORMERS, key, variant)
    try:
        with quiet_libraries():
            net, info = CLIPTextModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                variant=files.variant,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises various classes for files that do not match
        raise weights_error(key, folder, error) from error
    check_loaded(info, key, folder)
    return net, files.sha256
