"""Add the adapters in files to a model that draws."""

from sdtrain.adapters.embedding_file import read_embedding
from sdtrain.adapters.interface import networks_of
from sdtrain.adapters.textual_inversion import check_can_learn_words, teach
from sdtrain.conditioning.new_words import NewWord
from sdtrain.config.run_readers import as_list
from sdtrain.config.schema import SampleConfig
from sdtrain.latent_diffusion import LatentDiffusion


def add_adapters(config: SampleConfig, model: LatentDiffusion) -> None:
    """Add the new words of `embedding` and the updates of `lora` to a model.

    Raises UserError for a file that cannot be read, or that belongs to another model.
    """
    for path in as_list(config.embedding):
        check_can_learn_words(model.conditioner, "embedding", path)
        word, vectors = read_embedding(path, "embedding")
        teach(model.conditioner, NewWord(word, vectors=len(vectors)), vectors, "embedding", path)
    files = as_list(config.lora)
    if not files:
        return
    # Here, because peft takes two seconds to import.
    from sdtrain.adapters.lora import add_lora
    from sdtrain.adapters.lora_file import read_lora

    weights = as_list(config.lora_weight) or [1.0] * len(files)
    networks = networks_of(model)
    for number, (path, weight) in enumerate(zip(files, weights, strict=True)):
        updates = read_lora(path, "lora", networks)
        add_lora(networks, updates, f"lora_{number}", weight)
    model.to(model.device)
