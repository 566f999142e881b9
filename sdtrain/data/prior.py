"""Train pictures of a subject in turn with pictures of its class, see `types.Prior`."""

from dataclasses import replace

from sdtrain.data.order import Visits
from sdtrain.types import Pictures, Prior, Row

PRIOR_PART = 1
"""Number of the part of the data set that the prior is, for its order."""


class WithPrior:
    """The pictures of a subject, and after them those of a prior. Implements `types.Pictures`."""

    def __init__(self, subject: Pictures, prior: Prior) -> None:
        self.subject = subject
        self.prior = prior.data.split("train")
        self.weight = prior.weight

    def __len__(self) -> int:
        return len(self.subject) + len(self.prior)

    def __getitem__(self, item: tuple[int, int]) -> Row:
        index, ordinal = item
        count = len(self.subject)
        if index < count:
            return self.subject[item]
        return replace(self.prior[(index - count, ordinal)], loss_weight=self.weight)

    def visits_of_prior(self, seed: int) -> Visits:
        """Return which picture of the prior each of its turns visits. seed: of the run."""
        return Visits(
            length=len(self.prior),
            seed=seed,
            weights=getattr(self.prior, "weights", None),
            part=PRIOR_PART,
        )
