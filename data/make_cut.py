#!/usr/bin/env python3
"""Makes the cut of Fashion-MNIST that is built into the binary.

The first 1 000 training images and the first 200 test images of every class, kept in file order, so that the cut is
balanced and always the same. Needs Python's standard library only and the four files of the full set, which Debian
and Ubuntu install with `apt-get install dataset-fashion-mnist`.

    python3 data/make_cut.py [FOLDER_OF_THE_FULL_SET] [FOLDER_OF_THE_CUT]
"""

import gzip
import pathlib
import struct
import sys

IMAGE_MAGIC, LABEL_MAGIC = 0x803, 0x801
CLASSES = 10


def read(folder, split):
    """All images (as one bytes object each) and labels of one split."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        magic, count, height, width = struct.unpack(">4I", file.read(16))
        assert magic == IMAGE_MAGIC, f"{split}: not an IDX image file"
        pixels = file.read()
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        magic, labelled = struct.unpack(">2I", file.read(8))
        assert magic == LABEL_MAGIC, f"{split}: not an IDX label file"
        labels = file.read()
    size = height * width
    assert count == labelled == len(labels) and len(pixels) == count * size, f"{split}: counts do not agree"
    return [pixels[i * size : (i + 1) * size] for i in range(count)], labels, (height, width)


def first_of_every_class(labels, per_class):
    """The indices of the first `per_class` images of every class, in file order."""
    seen, kept = [0] * CLASSES, []
    for index, label in enumerate(labels):
        if seen[label] < per_class:
            seen[label] += 1
            kept.append(index)
    assert seen == [per_class] * CLASSES, f"a class holds fewer than {per_class} images: {seen}"
    return kept


def write(path, header, body):
    # No name and no time in the gzip header: the same cut is the same file, byte for byte.
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as file:
        file.write(header)
        file.write(body)
    print(f"{path}: {path.stat().st_size} bytes")


def main():
    here = pathlib.Path(__file__).resolve().parent
    source = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/datasets/fashion-mnist")
    target = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else here / "fashion-mnist-cut"
    target.mkdir(parents=True, exist_ok=True)
    for split, name, per_class in (("train", "train", 1000), ("t10k", "test", 200)):
        images, labels, (height, width) = read(source, split)
        kept = first_of_every_class(labels, per_class)
        header = struct.pack(">4I", IMAGE_MAGIC, len(kept), height, width)
        write(target / f"{name}-images.gz", header, b"".join(images[i] for i in kept))
        write(target / f"{name}-labels.gz", struct.pack(">2I", LABEL_MAGIC, len(kept)), bytes(labels[i] for i in kept))


if __name__ == "__main__":
    main()
