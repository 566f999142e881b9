"""Condition on a caption with a CLIP text model that is trained together with the UNet."""

from collections.abc import Sequence
from typing import ClassVar

from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtrain.conditioning.interface import Conditioner, Conditioning, Inputs
from sdtrain.conditioning.tokens import Tokenize
from sdtrain.errors import UserError
from sdtrain.paths import find_folder

EMBEDDING_STD = 0.5
"""Standard deviation of the initial embeddings. CLIP's own 0.02 is meant for days of training: in a
short run all words and all positions would remain almost equal. Layer norms set the scale of all
later activations.
"""


class Text(Conditioner):
    """A CLIP text model with random initial weights (Radford et al. 2021, section 2.4).

    context [B, max_length, D] is its last hidden state. A dropped caption is replaced by the empty
    one, so the unconditional context is that of the empty prompt. Every caption is padded to
    max_length, so that its context does not depend on the others in the batch. Longer captions are
    truncated.

    Args:
        context_dim: width D of the text model and of the context.
        layers, heads: numbers of layers and attention heads.
        max_length: number of tokens, with the two that mark begin and end.
        tokenizer: folder of a CLIP tokenizer; "data/..." is also searched for in sdtrain's data.
    """

    reads = frozenset({"caption"})
    kept_files: ClassVar[dict[str, tuple[str, ...]]] = {"tokenizer": ("*.json", "*.txt")}

    def __init__(
        self, *, context_dim: int, layers: int, heads: int, max_length: int, tokenizer: str
    ) -> None:
        super().__init__()
        if context_dim % heads:
            raise UserError(
                f"must be a multiple of model.conditioner.heads={heads}",
                key="model.conditioner.context_dim",
                value=context_dim,
            )
        folder = find_folder(tokenizer, "model.conditioner.tokenizer")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.context_dim = context_dim
        self.max_length = max_length
        self.tokenize = Tokenize(self.tokenizer, max_length)
        self.net = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=context_dim,
                intermediate_size=4 * context_dim,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=max_length,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )
        nn.init.normal_(self.net.get_input_embeddings().weight, std=EMBEDDING_STD)
        nn.init.normal_(self.net.embeddings.position_embedding.weight, std=EMBEDDING_STD)

    @property
    def max_tokens(self) -> int:
        return self.max_length

    @property
    def tokens_key(self) -> str:
        return self.tokenize.key

    def count_truncated(self, captions: Sequence[str]) -> int:
        return self.tokenize.count_truncated(captions)

    def forward(self, inputs: Inputs) -> Conditioning:
        hidden = self.net(input_ids=self.tokenize.of_inputs(inputs)).last_hidden_state
        return Conditioning(context=hidden)
