"""How an index keeps vectors: float, int8 or bits.

A vector v is kept in one of three ways. A search reads all of them (sqlite-vec has no graph), keeps the best few, and
scores these again with the question's vector q in float32:

    float   v, 4 bytes a number; the cosine of q and v at once
    int8    c = round(127 v / max|v|), 1 byte a number; the cosine of the rounded q and c, then that of q and c
    bit     the signs of v, 1 bit a number, beside the bytes of int8; their Hamming distance, then the cosine of q and c

The scale of each c is not kept: a cosine does not need it. |q.v - cosine(q, c)| stays below sqrt(dim) / 254 * max|v| in
length 1, since no number of c is further than half a step from its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UserError
from edgekit.runtime.embeddings import Floats

Vectors = Literal["float", "int8", "bit"]
MOST = 4096  # neighbours that sqlite-vec gives
POOL: dict[Vectors, int] = {"float": 1, "int8": 2, "bit": 8}  # neighbours scored again, for each one wanted
AS_VECTOR: dict[Vectors, str] = {"float": "vec_f32(?)", "int8": "vec_int8(?)", "bit": "vec_bit(?)"}  # in SQL


def tables(vectors: Vectors, dim: int) -> str:
    """The SQL that makes the tables. Raises UserError for bits of a dimension that fills no bytes."""
    if vectors == "bit" and dim % 8:
        raise UserError(f"--vectors bit needs a dimension that is a multiple of 8: the embedder has {dim}; use int8")
    metric = "" if vectors == "bit" else " distance_metric=cosine"
    kind = {"float": "float", "int8": "int8", "bit": "bit"}[vectors]
    made = f"CREATE VIRTUAL TABLE vectors USING vec0(vector {kind}[{dim}]{metric});"
    return made + ("CREATE TABLE codes (id INTEGER PRIMARY KEY, code BLOB NOT NULL);" if vectors == "bit" else "")


def stored(vector: Floats, vectors: Vectors) -> bytes:
    """A vector (dim,) float32 as the index keeps it."""
    if vectors == "float":
        return np.ascontiguousarray(vector, np.float32).tobytes()
    if vectors == "bit":
        return np.packbits(vector > 0, bitorder="little").tobytes()
    largest = max(float(np.abs(vector).max()), float(np.finfo(np.float32).tiny))
    codes: NDArray[np.int8] = np.rint(vector * (127 / largest)).astype(np.int8)
    return codes.tobytes()


def cosines(query: Floats, rows: Sequence[bytes], vectors: Vectors) -> Floats:
    """The cosine of a vector (dim,) with each of `rows`, kept as float or as int8 codes, (n,) float32."""
    kind = np.float32 if vectors == "float" else np.int8
    matrix = np.array([np.frombuffer(row, kind) for row in rows], np.float32).reshape(len(rows), -1)
    lengths = np.linalg.norm(matrix, axis=1) * np.linalg.norm(query)
    found: Floats = matrix @ query / np.maximum(lengths, np.finfo(np.float32).tiny)
    return found
