"""config.yaml of a run or of a checkpoint, read back as it was saved. Without torch."""

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sdtrain.errors import StorageError


def read_config(path: Path) -> dict:
    """The configuration in the file, nothing of it resolved. Raises StorageError where it cannot be
    read or is no plain mapping.
    """
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        raise unreadable(path, error) from error
    if not isinstance(saved, dict):
        raise unreadable(path, TypeError("it is a list"))
    return saved


def unreadable(path: Path, error: Exception) -> StorageError:
    """The file of a run is not what sdtrain writes."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return StorageError(
        f"{path} is not what sdtrain writes, and is not read: {reason[:300]}",
        key="checkpoint",
        remedy="Give another checkpoint, or remove this one.",
    )
