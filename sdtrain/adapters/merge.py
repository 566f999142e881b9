"""Merge what an adapter has trained into the weights of the model, which needs no adapter then."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sdtrain.adapters.textual_inversion import ExtendedEmbedding


@torch.no_grad()
def merge_adapter(network: nn.Module) -> None:
    """Replace the layers of a LoRA and the embedding of new words by plain ones, in place.

    Outputs differ by rounding.
    """
    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            _replace(network, name, module.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config
    for name, module in list(network.named_modules()):
        if isinstance(module, ExtendedEmbedding):
            plain = nn.Embedding(module.num_embeddings, module.embedding_dim)
            plain.weight.copy_(module(torch.arange(module.num_embeddings)))
            _replace(network, name, plain)
            network.config.vocab_size = module.num_embeddings
            return  # the outermost holds the others


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, layer)
