"""data.json of a run: what sampling and evaluation need to know about the data.

With it they do not need the pictures themselves. Needs no torch.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sdtrain.errors import StorageError
from sdtrain.files import write_text
from sdtrain.runs.config import unreadable_error
from sdtrain.runs.layout import RunFolder


@dataclass(frozen=True)
class DataRecord:
    """What a run records about its data.

    Args:
        image_size: side of the pictures, in pixels.
        num_classes: number of class labels.
        example_prompts: captions in random order, so that the first few are as varied as all of
            them; empty if the model reads no captions.
        working_directory: where the run was started; its relative paths begin there.
        untrained: labels whose pictures are all held out for validation.
    """

    image_size: int
    num_classes: int
    example_prompts: Sequence[str]
    working_directory: str
    untrained: Sequence[int] = ()

    def prompts(self, count: int) -> list[str]:
        """Return `count` of the example prompts, repeated if there are fewer."""
        prompts = self.example_prompts or [""]
        return [prompts[i % len(prompts)] for i in range(count)]

    def resolve_path(self, path: str) -> Path:
        """Resolve a path of the run's configuration relative to where the run was started."""
        return Path(self.working_directory) / Path(path).expanduser()


def write_data_record(run: RunFolder, record: DataRecord) -> None:
    """Write data.json. Raises OSError."""
    text = json.dumps(asdict(record), indent=1, ensure_ascii=False)
    # A caption may contain a lone surrogate, which UTF-8 cannot encode.
    write_text(run.data_record, text.encode(errors="replace").decode() + "\n")


def read_data_record(run: RunFolder) -> DataRecord | None:
    """Return the record, or None for a run of an earlier version, which has none.

    Raises StorageError if sdtrain did not write the file.
    """
    try:
        text = run.data_record.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable_record_error(run, error) from error
    try:
        record = TypeAdapter(DataRecord).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise _unreadable_record_error(run, ValueError(f"{field} {first['msg']}")) from error
    if record.image_size < 1:
        raise _unreadable_record_error(run, ValueError(f"image_size is {record.image_size}"))
    return record


def _unreadable_record_error(run: RunFolder, error: Exception) -> StorageError:
    return unreadable_error(run.data_record, error)
