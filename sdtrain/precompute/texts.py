"""What a frozen text encoder makes of each caption, in a store."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sdtrain.conditioning.interface import Conditioner, Inputs
from sdtrain.data.cached import CachedContexts
from sdtrain.data.shards import key_of
from sdtrain.data.split import PictureSplit
from sdtrain.precompute.sharing import Batch, SharedWork
from sdtrain.precompute.store import Store

TEXTS_IN_BATCH = 32


def captions_to_cache(splits: Mapping[str, PictureSplit]) -> list[str]:
    """Return each caption that a visit may read, and the empty one, once."""
    captions = {"": None}
    for split in splits.values():
        captions |= dict.fromkeys(split.captions)
    return list(captions)


def why_texts_are_not_cached(
    conditioner: Conditioner, splits: Mapping[str, PictureSplit]
) -> str | None:
    """Return why the contexts of captions have no cached form, or None if they have one.

    Also "" if the conditioner reads no captions.
    """
    if "caption" not in conditioner.reads:
        return ""
    if not conditioner.frozen:
        return "the text encoder is trained"
    if not conditioner.takes_context:
        return f"{type(conditioner).__name__} takes no cached contexts"
    if not all(split.has_fixed_captions for split in splits.values()):
        return "the captions differ from visit to visit"
    return None


@dataclass
class TextEncoding:
    """Runs a text encoder on the captions that a store lacks.

    Args:
        store: of the contexts.
        conditioner: the frozen text encoder, in eval mode while it runs.
        device: of the network while it runs.
    """

    store: Store
    conditioner: Conditioner
    device: torch.device

    def missing_in(self, batch: Batch) -> list[str]:
        """Return the captions of a batch that the store lacks, after what others have added."""
        self.store.shards.refresh()
        return [text for text in batch.items if key_of(caption=text) not in self.store.shards]

    def bytes_each(self, dtype: type) -> int:
        """Return the bytes of one context."""
        return self._contexts([""]).size * np.dtype(dtype).itemsize

    def run(
        self,
        captions: Sequence[str],
        encoded: Callable[[int], None],
        waiting: Callable[[int], None],
    ) -> None:
        """Return once no caption is missing. Raises StorageError.

        encoded: called after each batch with its number of captions. waiting: called with the
        number of captions that other processes have left.
        """
        batches = []
        for start in range(0, len(captions), TEXTS_IN_BATCH):
            part = captions[start : start + TEXTS_IN_BATCH]
            batches.append(Batch("\n".join(part), part))
        work = SharedWork(self.store.claims, batches, self.missing_in)
        while work.is_left:
            self._encode_claimed(work, encoded)
            work.wait_for_others(waiting)

    def _encode_claimed(self, work: SharedWork, encoded: Callable[[int], None]) -> None:
        """Encode and write all batches that this process can claim."""
        while batch := work.claim_next():
            self._encode(batch.items)
            work.note_computed(batch.name)
            encoded(len(batch.items))
            if self.store.is_due:
                self._write(work)
        self._write(work)

    def _write(self, work: SharedWork) -> None:
        self.store.flush()
        work.release_computed()

    def _encode(self, captions: Sequence[str]) -> None:
        # Always of one size, for the reason that `Encoder` gives.
        filled = [*captions, *[""] * (TEXTS_IN_BATCH - len(captions))]
        for caption, value in zip(captions, self._contexts(filled), strict=False):
            self.store.add(key_of(caption=caption), value)

    def _contexts(self, captions: Sequence[str]) -> np.ndarray:
        labels = torch.zeros(len(captions), dtype=torch.long, device=self.device)
        inputs = Inputs(captions, labels, labels.bool(), latent_size=(1, 1))
        with torch.inference_mode():
            return self.conditioner(inputs).context.float().cpu().numpy()


def cached_contexts(store: Store, captions: Sequence[str]) -> CachedContexts:
    """Return the contexts of captions, all of which are in the store."""
    places = store.shards.places(key_of(caption=caption) for caption in captions)
    return CachedContexts(shards=store.shards.shards, captions=captions, places=places)
