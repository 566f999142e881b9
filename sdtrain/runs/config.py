"""Read the config.yaml of a run or of a checkpoint as it was saved. Needs no torch."""

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sdtrain.errors import StorageError, first_line


def read_config(path: Path) -> dict:
    """Return the configuration in the file, without resolving references in it.

    Raises StorageError if the file cannot be read or does not hold a mapping.
    """
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        raise unreadable_error(path, error) from error
    if not isinstance(saved, dict):
        raise unreadable_error(path, TypeError("it is a list"))
    return saved


def unreadable_error(path: Path, error: Exception) -> StorageError:
    """Return the error to raise if a file of a run is not what sdtrain writes."""
    return StorageError(
        f"{path} cannot be read as a file that sdtrain wrote: {first_line(error)[:300]}",
        key="checkpoint",
        remedy="Give another checkpoint, or move this file away.",
    )
