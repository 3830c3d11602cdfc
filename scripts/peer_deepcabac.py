"""The bytes that DeepCABAC needs for integer tensors: runs in an environment of its own, for `bench_codec.py --peers`.

    python scripts/peer_deepcabac.py TENSORS.npz > ANSWER.json

Needs the extension module `deepCABAC` of nncodec 2.1.3 (how to build it: `bench_codec.py`). Each tensor is coded under
all of the coder's settings: the order of the scan (rows, or blocks of 8 to 64), skipping of empty rows, and the search
for each context's adaptation rate. The shortest stream counts that decodes back (blocks taller than the tensor do not).
Tensors go in as they are, so that the matrix is the one that the coder chooses itself: the first axis by the rest. What
a file of nncodec would add (shapes, entry points of the blocks) is not counted.
"""

import json
import sys
from itertools import product

import deepCABAC
import numpy as np

UNARY = 10
HISTORY = np.zeros(2, np.int8)
OFF = deepCABAC.HdspMode.AlwaysOff


def encode(levels, scan, skip, search):
    empty = np.array([not row.any() for row in levels] if levels.ndim > 1 else [0] * len(levels), np.int32)
    encoder = deepCABAC.Encoder()
    encoder.initCtxModels(UNARY, search)
    encoder.encodeLayer(levels, 0, scan, 1, 0, skip, empty, OFF, HISTORY, 0, 0)
    return encoder.finish().tobytes()


def decode(data, shape, scan):
    levels = np.zeros(shape, np.int32)
    decoder = deepCABAC.Decoder()
    stream = np.frombuffer(data, np.uint8)
    decoder.setStream(stream)
    decoder.initCtxModels(UNARY)
    decoder.decodeLayerAndCreateEPs(levels, 0, scan, 1, 0, OFF, HISTORY, 0, 0)
    return levels


def best(levels):
    """Bytes and settings of the shortest stream."""
    scans = range(5) if levels.ndim > 1 else [0]
    skips = (0, 1) if levels.ndim > 1 else [0]
    ways = sorted((len(encode(levels, *way)), *way) for way in product(scans, skips, (0, 1)))
    for length, scan, skip, search in ways:
        if np.array_equal(decode(encode(levels, scan, skip, search), levels.shape, scan), levels):
            return {"bytes": length, "scan": scan, "skip": skip, "search": search}
    raise SystemExit(f"no stream of a tensor of shape {levels.shape} decodes back")


if __name__ == "__main__":
    with np.load(sys.argv[1]) as tensors:
        json.dump({name: best(np.ascontiguousarray(tensors[name], np.int32)) for name in tensors.files}, sys.stdout)
