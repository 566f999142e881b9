"""The command sdtrain-precompute: compute the latents of a run's pictures before it is trained."""

import sys

from omegaconf import DictConfig

from sdtrain.config.boundary import run_command
from sdtrain.config.cache_keys import with_cache_on
from sdtrain.config.compose import current_overrides, resolve_config
from sdtrain.config.importing import collector_off
from sdtrain.config.launch import rank_before_config, rank_for_config
from sdtrain.config.new_folders import remove_if_unused
from sdtrain.config.overrides import is_sweep, typed_values
from sdtrain.config.precheck import devices_of, is_one_process, precheck_config
from sdtrain.console import set_rank
from sdtrain.errors import UserError


def task(cfg: DictConfig) -> None:
    overrides = current_overrides()
    with remove_if_unused():  # no run begins, so its folder is not needed
        config = with_cache_on(resolve_config(cfg, overrides), overrides)
        set_rank(rank_for_config(devices_of(config), is_one_process=is_one_process(config)))
        prechecked = precheck_config(config, overrides)
        with collector_off():
            from sdtrain.training.cache import precompute
        precompute(prechecked)


def refuse_sweep(arguments: list[str]) -> list[str]:
    """Raise UserError for a sweep, before Hydra writes its record; return no overrides."""
    if is_sweep(arguments):
        raise UserError(
            "sdtrain-precompute makes one cache, and no sweep",
            key="hydra.mode",
            remedy="Leave out -m, and start the command once for each data set or autoencoder.",
        )
    return []


def main() -> None:
    set_rank(rank_before_config(typed_values(sys.argv[1:])))
    # Only the folder of the run, which is removed: errors of the cache name data.cache themselves.
    run_command(task, "train", output_key="hydra.run.dir", extra_overrides=refuse_sweep)


if __name__ == "__main__":
    main()
