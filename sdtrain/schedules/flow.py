"""The straight path of flow matching."""

import torch

from sdtrain.schedules.schedule import Schedule


def flow(*, num_timesteps: int = 1000) -> Schedule:
    """alpha = 1 - t, sigma = t: log_snr = 2 ln((1 - t) / t).

    Liu et al. 2022, eq. 1; Lipman et al. 2023, eq. 20 with sigma_min = 0.
    """
    return Schedule(
        "flow",
        lambda t: 2 * (torch.log1p(-t) - torch.log(t)),
        lambda log_snr: (-log_snr / 2).sigmoid(),
        num_timesteps=num_timesteps,
        straight=True,
    )
