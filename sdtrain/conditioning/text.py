"""A caption as condition, through a CLIP text model that is trained with the UNet."""

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtrain.paths import find_folder
from sdtrain.types import Conditioning


class Text(nn.Module):
    """A CLIP text model with random weights (Radford et al. 2021, section 2.4). context [B, max_length, D] is its last hidden state.

    A dropped caption is the empty one, so the unconditional context is what the empty prompt gives. Every caption is padded to
    max_length: the context of one does not depend on the others in its batch. Longer captions are cut.

    Args:
        context_dim: width D of the text model and of the context.
        layers, heads: of its transformer.
        max_length: tokens of a caption, with the two that mark its begin and end.
        tokenizer: folder of a CLIP tokenizer; "data/..." is also looked for in sdtrain's own data.
    """

    reads = "caption"

    def __init__(
        self, *, context_dim: int, layers: int, heads: int, max_length: int, tokenizer: str
    ) -> None:
        super().__init__()
        if context_dim % heads:
            raise ValueError(
                f"model.conditioner.context_dim={context_dim} must be a multiple of model.conditioner.heads={heads}."
            )
        self.tokenizer = CLIPTokenizer.from_pretrained(
            find_folder(tokenizer, "model.conditioner.tokenizer"), local_files_only=True
        )
        self.context_dim, self.max_length = context_dim, max_length
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
        # CLIP's embeddings start at a standard deviation of 0.02, meant for days of training: for the length of a short run all words
        # and all places would look alike. The layer norms set the scale of everything after them.
        for embedding in (self.net.get_input_embeddings(), self.net.embeddings.position_embedding):
            nn.init.normal_(embedding.weight, std=0.5)

    def cut(self, captions: list[str]) -> int:
        """How many of the captions have more than max_length tokens."""
        return sum(len(tokens) > self.max_length for tokens in self.tokenizer(captions).input_ids)

    def forward(self, captions: list[str], labels: Tensor, drop: Tensor) -> Conditioning:
        """captions: B strings, drop [B] bool."""
        kept = [
            "" if dropped else caption
            for caption, dropped in zip(captions, drop.tolist(), strict=True)
        ]
        tokens = self.tokenizer(
            kept,
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).input_ids
        return Conditioning(context=self.net(input_ids=tokens.to(drop.device)).last_hidden_state)
