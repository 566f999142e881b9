"""Which differences between two configurations refuse a resume."""

from sdtrain.runs.resume import compare_configs, format_changes


def fine_tuning(cache: str, pretrained: str = "OWNER/NAME", **unet: str) -> dict:
    folders = {"architecture": f"{cache}/unet", "weights": f"{cache}/unet"}
    return {
        "model": {
            "pretrained": pretrained,
            "revision": None,
            "variant": None,
            "unet": folders | unet,
            "autoencoder": {"path": f"{cache}/vae", "sha256": "a"},
        }
    }


def test_a_cache_that_lies_elsewhere_is_no_difference():
    changes = compare_configs(fine_tuning("/a"), fine_tuning("/b"))
    assert not changes.changed


def test_other_sources_and_other_folders_are_refused():
    old = fine_tuning("/a")
    assert "model.pretrained" in compare_configs(old, fine_tuning("/b", "OWNER/OTHER")).refused
    assert "model.unet.weights" in compare_configs(old, fine_tuning("/b", "OWNER/OTHER")).refused
    other = fine_tuning("/a", weights="/own/network")
    assert list(compare_configs(old, other).refused) == ["model.unet.weights"]
    other = fine_tuning("/b")
    other["model"]["autoencoder"]["sha256"] = "b"
    assert list(compare_configs(old, other).refused) == ["model.autoencoder.sha256"]


def test_long_lists_are_counted():
    line = format_changes({"schedule.betas": (list(range(1000)), None), "a": ([1, 2], 3)})
    assert line == "schedule.betas: 1000 values -> None, a: [1, 2] -> 3"
