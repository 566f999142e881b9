"""What an adapter needs of the model that it is trained in."""

from sdtrain.errors import UserError


def check_adapter(config: dict, typed: set[str], *, trains_autoencoder: bool) -> None:
    """Raise UserError for an adapter in a model without trained weights, and for keys without
    effect beside it.
    """
    if not config.get("adapter"):
        return
    model = config["model"]
    if trains_autoencoder or model.get("pretrained") is None:
        raise UserError(
            "An adapter changes a trained model, and this one would begin with random weights",
            key="adapter",
            remedy="Set model=stable_diffusion and model.pretrained=PIPELINE. sdtrain-export "
            "writes a run as a pipeline; one that draws shapes is "
            "model.pretrained=data/shapes_text_to_image.",
        )
    if model.get("architecture") is not None:
        raise UserError(
            "lets the UNet begin with random weights, in which an adapter cannot be trained",
            key="model.architecture",
            value=model["architecture"],
            remedy="Remove it, or remove adapter.",
        )
    if "model.train" in typed:
        raise UserError(
            "has no effect with an adapter, which alone is trained",
            key="model.train",
            value=model["train"],
            remedy="Remove it. adapter=lora adapter.text_encoder=true also updates the text "
            "encoder.",
        )
