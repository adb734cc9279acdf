"""sacrebleu's TER, much faster: its search for shifts on bit vectors, all candidates of a round in one number."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from sacrebleu.metrics import TER

# Limits of Tercom and sacrebleu: they decide which shifts are tried, so they are part of the score.
SHIFT_SIZE, SHIFT_DISTANCE, CANDIDATES, BEAM = 10, 50, 1000, 25


class FastTER(TER):
    """
    sacrebleu's TER, to the last digit.

    Edits never number fewer than the words of the longer side that the other lacks (shifts move words, they change
    none): references are tried in the order of that bound, until it reaches the best found.
    """

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict) -> list[float]:
        words, references = hypothesis.split(), ref_kwargs["ref_words"]
        have = Counter(words)
        bounds = [max(len(words), len(ref)) - (have & Counter(ref)).total() for ref in references]
        best = math.inf
        for bound, i in sorted(zip(bounds, itertools.count(), strict=False)):
            if bound >= best:
                break
            best = min(best, edits(words, references[i], bound, best))
        return [best, sum(map(len, references)) / len(references)]


def edits(hypothesis: Sequence[str], reference: Sequence[str], bound: int = 0, enough: float = math.inf) -> float:
    """
    Return the edits of TER: insertions, deletions, substitutions, and shifts found by Tercom's greedy search.

    Args:
        hypothesis, reference (`Sequence[str]`): words.
        bound (`int`): a number that edits without shifts cannot fall below, whatever is shifted.
        enough (`float`): a number from which on the exact one is of no interest; something not below it may come back.
    """
    if not hypothesis or not reference:
        return max(len(hypothesis), len(reference))
    number: dict[str, int] = {}
    for word in reference:
        number.setdefault(word, len(number))
    ref = [number[word] for word in reference]
    words = [number.get(word, -1) for word in hypothesis]  # words that the reference lacks are all alike: never equal
    distances = _Distances(ref, len(words))
    shifts = tried = 0
    matrix = distances.matrix(words)
    while shifts + bound < enough:
        shifted, tried = _best_shift(words, ref, distances, matrix, tried)
        if tried >= CANDIDATES or shifted is None:
            break
        shifts += 1
        words, matrix = shifted
    return shifts + matrix[-1][-1]


def _best_shift(
    words: list[int], ref: list[int], distances: _Distances, matrix: list[list[int]], tried: int
) -> tuple[tuple[list[int], list[list[int]]] | None, int]:
    """Return the words after the shift that lowers the distance most, with their matrix (None: no shift does)."""
    candidates, tried = _candidates(words, ref, matrix, tried)
    if tried >= CANDIDATES or not candidates:
        return None, tried
    before = matrix[-1][-1]
    shifted = [_shift(words, *key) for key in candidates]
    # Ranked as Tercom does: the gain, then the longest, then the first. The distances within the beam, which count,
    # are no smaller than those without: whatever could still be best is looked at closely.
    ranked = sorted(
        (
            ((before - distance, length, -start, -target), number)
            for number, ((start, length, target), distance) in enumerate(
                zip(candidates, distances.of(shifted), strict=True)
            )
            if distance < before
        ),
        reverse=True,
    )
    best, found = (0, 0, 0, 0), None
    for rank, i in ranked:
        if found is not None and rank < best:
            break
        exact = distances.matrix(shifted[i])
        gain = before - exact[-1][-1]
        if gain > 0 and (found is None or (gain, *rank[1:]) > best):
            best, found = (gain, *rank[1:]), (shifted[i], exact)
    return found, tried


def _candidates(
    words: list[int], ref: list[int], matrix: list[list[int]], tried: int
) -> tuple[list[tuple[int, int, int]], int]:
    """Return the shifts (start, length, target) that Tercom tries, each once, and how many it has tried in all."""
    aligned, ref_wrong, wrong = _alignment(words, ref, matrix)
    wrong_until = [0, *itertools.accumulate(wrong)]
    ref_wrong_until = [0, *itertools.accumulate(ref_wrong)]
    found: dict[tuple[int, int, int], None] = {}
    for start, ref_start, length in _matches(words, ref):
        if wrong_until[start] == wrong_until[start + length]:
            continue
        if ref_wrong_until[ref_start] == ref_wrong_until[ref_start + length]:
            continue
        if start <= aligned[ref_start] < start + length:
            continue
        previous = -1
        for place in range(ref_start - 1, ref_start + length):
            target = 0 if place < 0 else aligned[place] + 1
            if target != previous:
                previous = target
                found[start, length, target] = None
                tried += 1
        if tried >= CANDIDATES:
            break
    return list(found), tried


def _matches(words: list[int], ref: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield what both have in common, as (start, start in the reference, length), in Tercom's order."""
    where: dict[int, list[int]] = {}
    for i, word in enumerate(ref):
        where.setdefault(word, []).append(i)
    for start, word in enumerate(words):
        for ref_start in where.get(word, ()):
            if abs(ref_start - start) > SHIFT_DISTANCE:
                continue
            most = min(SHIFT_SIZE, len(words) - start, len(ref) - ref_start)
            length = 1
            yield start, ref_start, length
            while length < most and words[start + length] == ref[ref_start + length]:
                length += 1
                yield start, ref_start, length


def _shift(words: list[int], start: int, length: int, target: int) -> list[int]:
    """Move `length` words from `start` to before `target` (within them: further right, as in sacrebleu)."""
    moved = words[start : start + length]
    if target < start:
        return words[:target] + moved + words[target:start] + words[start + length :]
    if target > start + length:
        return words[:start] + words[start + length : target] + moved + words[target:]
    return words[:start] + words[start + length : length + target] + moved + words[length + target :]


def _alignment(words: list[int], ref: list[int], matrix: list[list[int]]) -> tuple[list[int], list[int], list[int]]:
    """
    Trace a matrix back: substitutions before deletions before insertions.

    Returns:
        `tuple`: where each word of the reference stands in the hypothesis, and which words of either are wrong.
    """
    i, j = len(words), len(ref)
    aligned, ref_wrong, wrong = [0] * j, [1] * j, [1] * i
    while i > 0 or j > 0:
        here = matrix[i][j]
        differs = int(i > 0 and j > 0 and words[i - 1] != ref[j - 1])
        if i > 0 and j > 0 and matrix[i - 1][j - 1] + differs == here:
            i, j = i - 1, j - 1
            aligned[j] = i
            wrong[i] = ref_wrong[j] = differs
        elif i > 0 and matrix[i - 1][j] + 1 == here:
            i -= 1
        else:
            j -= 1
            aligned[j] = i - 1
    return aligned, ref_wrong, wrong


class _Distances:
    """
    Edit distances between one reference and hypotheses of one length.

    `matrix` has them within sacrebleu's beam, cell by cell; `of` those of many hypotheses at a time without a beam, by
    Myers' bit vectors (1999), one lane of whole bytes a hypothesis in one long integer.
    """

    def __init__(self, ref: list[int], length: int):
        self.ref, self.length = ref, length
        self.bytes = len(ref) // 8 + 1  # one bit more than words, for what an addition carries
        places = dict.fromkeys(ref, 0)
        for i, word in enumerate(ref):
            places[word] |= 1 << i
        self.places = {word: bits.to_bytes(self.bytes, "little") for word, bits in places.items()}
        self.places[-1] = bytes(self.bytes)
        ratio = len(ref) / length
        width = math.ceil(ratio / 2 + BEAM) if ratio / 2 > BEAM else BEAM
        self.beam = []
        for i in range(1, length + 1):
            middle = math.floor(i * ratio)
            last = len(ref) if i == length else min(len(ref), middle + width - 1)
            self.beam.append((max(0, middle - width), last))

    def matrix(self, words: list[int]) -> list[list[int]]:
        """Return the distances of all beginnings, `[words + 1][reference + 1]`; outside of the beam a large number."""
        width = len(self.ref) + 1
        outside = 1 << 30
        row = list(range(width))
        rows = [row]
        for word, (first, last) in zip(words, self.beam, strict=True):
            above, row = row, [outside] * width
            left = outside
            if first == 0:
                left = row[0] = above[0] + 1
                first = 1
            diagonal = above[first - 1]
            for j in range(first, last + 1):
                up = above[j]
                best = diagonal if self.ref[j - 1] == word else diagonal + 1
                if up < best:
                    best = up + 1
                if left < best:
                    best = left + 1
                row[j] = left = best
                diagonal = up
            rows.append(row)
        return rows

    def of(self, hypotheses: list[list[int]]) -> list[int]:
        """Return the distance of each hypothesis, without a beam."""
        size, count = self.bytes, len(hypotheses)
        lane = (1 << len(self.ref)) - 1
        full = int.from_bytes(lane.to_bytes(size, "little") * count, "little")
        first = int.from_bytes((1).to_bytes(size, "little") * count, "little")
        more, less = full, 0  # where a distance is one more, or less, than that of a reference shorter by one word
        for column in zip(*hypotheses, strict=True):
            equal = int.from_bytes(b"".join([self.places[word] for word in column]), "little")
            vertical = equal | less
            horizontal = ((((equal & more) + more) ^ more) | equal) & full
            up = less | (full & ~(horizontal | more))
            down = more & horizontal
            up = ((up << 1) & full) | first
            down = (down << 1) & full
            more = down | (full & ~(vertical | up))
            less = up & vertical
        ups, downs = more.to_bytes(size * count, "little"), less.to_bytes(size * count, "little")
        return [
            self.length
            + int.from_bytes(ups[i : i + size], "little").bit_count()
            - int.from_bytes(downs[i : i + size], "little").bit_count()
            for i in range(0, size * count, size)
        ]
