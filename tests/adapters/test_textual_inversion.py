"""New words: only their rows are trained, and captions are spelled out with all their tokens."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer
from untrained import make

from sdtrain.adapters.embedding_file import read_embedding
from sdtrain.adapters.textual_inversion import (
    ExtendedEmbedding,
    TextualInversion,
    add_word,
)
from sdtrain.conditioning.new_words import NewWord
from sdtrain.errors import UserError
from sdtrain.paths import find_folder


@pytest.fixture
def tokenizer():
    return CLIPTokenizer.from_pretrained(find_folder("data/tokenizer", "x"), local_files_only=True)


@pytest.fixture
def embedding(tokenizer):
    torch.manual_seed(0)
    return nn.Embedding(len(tokenizer), 4)


def test_only_the_new_rows_get_a_gradient(embedding):
    extended = ExtendedEmbedding(embedding, torch.ones(2, 4))
    count = embedding.num_embeddings
    tokens = torch.tensor([[0, count + 1, 5], [count, 1, count + 1]])
    found = extended(tokens)
    assert torch.equal(found[0, 0], embedding.weight[0])
    assert torch.equal(found[0, 1], extended.rows[1])
    assert torch.equal(found[1, 0], extended.rows[0])
    found.sum().backward()
    assert embedding.weight.grad is None
    assert extended.rows.grad.tolist() == [[1] * 4, [2] * 4]


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_new_word_begins_like_the_initial_one(tokenizer, embedding, vectors):
    new = NewWord("<cat>", "red", vectors)
    initial = tokenizer("red", add_special_tokens=False).input_ids[0]
    before = tokenizer("a red circle").input_ids
    extended = add_word(tokenizer, embedding, new)
    tokens = tokenizer(new.spelled_out("a <cat>"), add_special_tokens=False).input_ids
    count = embedding.num_embeddings
    assert tokens[-vectors:] == list(range(count, count + vectors))
    assert tokenizer("a red circle").input_ids == before
    for token in tokens[-vectors:]:
        assert torch.equal(extended(torch.tensor(token)), embedding.weight[initial])


def test_captions_are_spelled_out_once():
    new = NewWord("<cat>", "red", 2)
    assert new.spelled_out("a <cat>, a <cat>") == "a <cat> <cat>_1, a <cat> <cat>_1"
    assert new.spelled_out("a <CAT>") == "a <cat> <cat>_1"
    assert new.spelled_out("a cat") == "a cat"


def test_what_cannot_be_a_new_word_is_named(tokenizer, embedding):
    for new, key in (
        (NewWord("red</w>", "blue"), "adapter.word"),
        (NewWord("<cat>", "xylophones of glass"), "adapter.initial"),
    ):
        with pytest.raises(UserError) as caught:
            add_word(tokenizer, embedding, new)
        assert caught.value.key == key
    for arguments in ({"vectors": 0}, {"word": "a cat"}, {"word": ""}, {"word": "<Cat>"}):
        with pytest.raises(UserError):
            TextualInversion(**{"word": "<cat>", "initial": "red"} | arguments)


def test_a_model_trains_and_stores_only_the_rows():
    model = make("text")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.attach(TextualInversion(word="<cat>", initial="red", vectors=2))
    (name,) = model.trained_parameters()
    assert list(model.trained_state()) == [name]
    assert model.trained_state()[name].shape[0] == 2
    model.train()
    assert not any(part.training for part in (model.unet, model.conditioner, model.autoencoder))
    after = model.state_dict()
    for key, value in before.items():
        key = key.replace("token_embedding.weight", "token_embedding.base.weight")
        assert torch.equal(after[key], value), key
    model.load_trained_state({name: torch.ones_like(model.trained_state()[name])})
    assert (model.trained_state()[name] == 1).all()


def test_a_word_has_at_most_the_tokens_of_a_caption():
    with pytest.raises(UserError) as caught:
        make("text").attach(TextualInversion(word="<cat>", initial="red", vectors=11))
    assert caught.value.key == "adapter.vectors"


def test_embeddings_of_other_programs_are_read(tmp_path):
    """Pickles of tensors, of which nothing is executed."""
    rows = torch.arange(8.0).reshape(2, 4)
    made = {
        "web.pt": {"string_to_param": {"*": rows}, "name": "web", "step": 3},
        "one.bin": {"one": rows},
    }
    for name, content in made.items():
        torch.save(content, tmp_path / name)
        word, vectors = read_embedding(str(tmp_path / name), "embedding")
        assert (word, vectors.tolist()) == (name.partition(".")[0], rows.tolist())
    save_file({"emb_params": rows}, tmp_path / "named.safetensors")
    assert read_embedding(str(tmp_path / "named.safetensors"), "embedding")[0] == "named"
    (tmp_path / "text.pt").write_text("no pickle")
    torch.save([rows], tmp_path / "list.pt")
    torch.save({"step": 3}, tmp_path / "number.pt")
    torch.save({"word": Path("x")}, tmp_path / "code.pt")
    save_file({"": rows}, tmp_path / "empty.safetensors")
    save_file({"a": rows, "b": rows.clone()}, tmp_path / "two.safetensors")
    save_file({"a": rows * torch.nan}, tmp_path / "nan.safetensors")
    for name in (
        *("text.pt", "list.pt", "number.pt", "code.pt"),
        *("empty.safetensors", "two.safetensors", "nan.safetensors", "missing"),
    ):
        with pytest.raises(UserError) as caught:
            read_embedding(str(tmp_path / name), "embedding")
        assert caught.value.key == "embedding", name
