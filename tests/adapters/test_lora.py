"""LoRA: the base model at first and untouched afterwards; files that diffusers reads; merging."""

import copy

import pytest
import torch
from untrained import make

from sdtrain.adapters.lora import Lora
from sdtrain.adapters.merge import merge_adapter
from sdtrain.errors import UserError


def outputs(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    context = torch.randn(2, 5, model.conditioner.context_dim, generator=generator)
    return model.unet(x, torch.tensor([3.0, 900.0]), context)


@pytest.fixture
def trained():
    """(a model with a LoRA that has changed, its outputs before it had one)."""
    model = make("text")
    before = outputs(model).detach()
    model.attach(Lora(rank=2, alpha=4, text_encoder=True))
    assert torch.equal(outputs(model), before)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, before


def test_it_begins_as_the_base_model_and_trains_only_itself(trained):
    model, before = trained
    assert all("lora_" in name for name in model.trained_parameters())
    assert list(model.trained_state()) == list(model.trained_parameters())
    assert {name.partition(".")[0] for name in model.trained_state()} == {"unet", "conditioner"}
    assert not torch.allclose(outputs(model), before)
    base = make("text").state_dict()
    for name, value in model.state_dict().items():
        if name in model.trained_state():
            continue
        assert torch.equal(value, base[name.replace(".base_layer", "")]), name


def test_merged_it_draws_the_same(trained):
    model, _ = trained
    merged = copy.deepcopy(model)
    merge_adapter(merged.unet.net)
    torch.testing.assert_close(outputs(merged), outputs(model), rtol=0, atol=1e-5)
    assert merged.unet.state_dict().keys() == make("text").unet.state_dict().keys()


def test_what_cannot_be_is_named():
    for arguments, key in (
        ({"rank": 0}, "adapter.rank"),
        ({"alpha": 0.0}, "adapter.alpha"),
        ({"dora": True, "text_encoder": True}, "adapter.dora"),
    ):
        with pytest.raises(UserError) as caught:
            Lora(**{"rank": 2} | arguments)
        assert caught.value.key == key
    for targets in (["nowhere"], ["to_q", "nowhere"], ["attentions"]):
        with pytest.raises(UserError) as caught:
            make("text").attach(Lora(rank=2, targets=targets))
        assert caught.value.key == "adapter.targets"
        assert "to_q" in str(caught.value)
