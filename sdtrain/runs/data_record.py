"""data.json of a run: what drawing and measuring need to know of the data, so that the pictures
themselves are not needed. Without torch.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sdtrain.errors import StorageError
from sdtrain.files import write_text
from sdtrain.runs.config import unreadable
from sdtrain.runs.layout import RunFolder


@dataclass(frozen=True)
class DataRecord:
    """What a run remembers of its data.

    image_size: side of the pictures, in pixels. num_classes: of their labels. example_prompts:
    captions, as varied at the beginning as in the whole; none where the model reads none.
    working_directory: where the run was started, and its relative paths begin. untrained: labels of
    which all pictures are held out.
    """

    image_size: int
    num_classes: int
    example_prompts: Sequence[str]
    working_directory: str
    untrained: Sequence[int] = ()

    def prompts(self, count: int) -> list[str]:
        """`count` of the example prompts, in turn where there are fewer."""
        known = self.example_prompts or [""]
        return [known[i % len(known)] for i in range(count)]

    def resolved(self, path: str) -> Path:
        """A path of the run's configuration, seen from where the run was started."""
        return Path(self.working_directory) / Path(path).expanduser()


def write_data_record(run: RunFolder, record: DataRecord) -> None:
    """Raises OSError."""
    text = json.dumps(asdict(record), indent=1, ensure_ascii=False)
    # A caption may hold half a surrogate pair, which no UTF-8 can.
    write_text(run.data_record, text.encode(errors="replace").decode() + "\n")


def read_data_record(run: RunFolder) -> DataRecord | None:
    """None of a run that an earlier version trained. Raises StorageError where the file is none
    of ours.
    """
    try:
        text = run.data_record.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(run, error) from error
    try:
        record = TypeAdapter(DataRecord).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _unreadable(run, ValueError(f"{place} {first['msg']}")) from error
    if record.image_size < 1:
        raise _unreadable(run, ValueError(f"image_size is {record.image_size}"))
    return record


def _unreadable(run: RunFolder, error: Exception) -> StorageError:
    return unreadable(run.data_record, error)
