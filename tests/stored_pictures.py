"""The same captioned pictures as a folder and in each format of stored data sets."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}
COUNT = 24
ENCODED = ("name", "bytes", "depth")
"""Keys of a row that are not plain values."""


def rows(count: int = COUNT) -> list[dict]:
    """Rows with name, bytes, text, label, weight and style. Every third is a JPEG."""
    made = []
    colours = list(COLOURS)
    for i in range(count):
        colour = colours[i % 3]
        noise = np.random.default_rng(i).integers(0, 30, (20 + i % 5, 22, 3))
        pixels = np.clip(noise + COLOURS[colour], 0, 255).astype(np.uint8)
        encoded = io.BytesIO()
        suffix, form = ("jpg", "JPEG") if i % 3 == 0 else ("png", "PNG")
        Image.fromarray(pixels).save(encoded, form)
        made.append(
            {
                "name": f"{(i * 7) % count:03}.{suffix}",
                "bytes": encoded.getvalue(),
                "text": f"{colour} noise number {i}",
                "label": colour,
                "weight": 1 + i % 2,
                "style": "loud" if i % 2 else "quiet",
            }
        )
    return made


def with_depth(made: list[dict]) -> list[dict]:
    """Return rows with a depth map each: its red channel, as a PNG."""
    added = []
    for row in made:
        red = Image.open(io.BytesIO(row["bytes"])).getchannel("R")
        encoded = io.BytesIO()
        red.save(encoded, "PNG")
        added.append(row | {"depth": encoded.getvalue()})
    return added


def write_folder(folder: Path, made: list[dict]) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for row in made:
        (folder / row["name"]).write_bytes(row["bytes"])
        values = {key: value for key, value in row.items() if key not in ENCODED}
        lines.append(json.dumps({"file_name": row["name"], **values}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def image_table(made: list[dict]) -> pa.Table:
    """Return a table as datasets writes it, with a struct of bytes and path."""
    images = [{"bytes": row["bytes"], "path": row["name"]} for row in made]
    columns = {"image": pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))}
    for name in ("text", "label", "weight", "style"):
        columns[name] = [row[name] for row in made]
    if "depth" in made[0]:
        columns["depth"] = pa.array([row["depth"] for row in made], pa.binary())
    return pa.table(columns)


def write_parquet(folder: Path, made: list[dict], *, files: int = 2) -> Path:
    folder.mkdir(parents=True)
    size = -(-len(made) // files)
    for file in range(files):
        part = made[file * size : (file + 1) * size]
        path = folder / f"train-{file:05}-of-{files:05}.parquet"
        pq.write_table(image_table(part), path, row_group_size=5)
    return folder


def write_arrow(folder: Path, made: list[dict]) -> Path:
    from datasets import Dataset
    from datasets import Image as ImageFeature

    data = Dataset(image_table(made)).cast_column("image", ImageFeature(decode=False))
    data.save_to_disk(str(folder), num_shards=2)
    return folder


def write_tar(folder: Path, made: list[dict], *, files: int = 2) -> Path:
    folder.mkdir(parents=True)
    size = -(-len(made) // files)
    for file in range(files):
        with tarfile.open(folder / f"{file:06}.tar", "w") as tar:
            for row in made[file * size : (file + 1) * size]:
                values = {key: row[key] for key in ("text", "label", "weight", "style")}
                add(tar, row["name"], row["bytes"])
                if "depth" in row:
                    add(tar, f"{Path(row['name']).stem}.depth.png", row["depth"])
                add(tar, f"{Path(row['name']).stem}.json", json.dumps(values).encode())
    return folder


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member to a tar file."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


FORMATS = {"parquet": write_parquet, "arrow": write_arrow, "tar": write_tar}
