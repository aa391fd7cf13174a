"""Which texts say nearly the same: by the share of word triples that two have in common.

MinHash (Broder 1997) with bands finds the candidates, their exact Jaccard index decides; so it takes time in
proportion to the number of texts, and nothing is dropped that is not a near-duplicate.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from shared.data.words import ngrams, words

_BANDS, _ROWS = 32, 4  # at a Jaccard index of 0.7 a pair is missed once in 6,000
_PRIME = (1 << 31) - 1
_RANDOM = np.random.default_rng(0)
_FACTOR = _RANDOM.integers(1, _PRIME, _BANDS * _ROWS, dtype=np.int64)
_OFFSET = _RANDOM.integers(0, _PRIME, _BANDS * _ROWS, dtype=np.int64)


class NearDuplicates:
    """The texts seen so far that are no near-duplicates of earlier ones."""

    def __init__(self, threshold: float = 0.7) -> None:
        """`threshold` is the Jaccard index from which on two texts count as the same, (0, 1]."""
        assert 0 < threshold <= 1, threshold
        self._threshold = threshold
        self._kept: list[tuple[int, frozenset[tuple[str, ...]]]] = []  # the text's number, its triples
        self._buckets: dict[tuple[int, bytes], list[int]] = {}
        self._seen = 0

    def add(self, text: str) -> int | None:
        """Take a text in; the number of the earlier text that it nearly is, or None for a new one."""
        number, self._seen = self._seen, self._seen + 1
        triples = frozenset(ngrams(words(text), 3))
        bands = _bands(triples)
        candidates = {index for band in bands for index in self._buckets.get(band, ())}
        for index in sorted(candidates):
            earlier, others = self._kept[index]
            shared, union = len(triples & others), len(triples | others)
            if union == 0 or shared >= self._threshold * union:
                return earlier
        for band in bands:
            self._buckets.setdefault(band, []).append(len(self._kept))
        self._kept.append((number, triples))
        return None


def _bands(triples: frozenset[tuple[str, ...]]) -> list[tuple[int, bytes]]:
    if not triples:  # texts without words are all the same
        return [(-1, b"")]
    hashes: npt.NDArray[np.int64] = np.array(
        [zlib.crc32(" ".join(triple).encode("utf-8", "replace")) for triple in triples], dtype=np.int64
    )
    signature = ((hashes[:, None] % _PRIME * _FACTOR + _OFFSET) % _PRIME).min(axis=0)
    return [(band, signature[band * _ROWS : (band + 1) * _ROWS].tobytes()) for band in range(_BANDS)]
