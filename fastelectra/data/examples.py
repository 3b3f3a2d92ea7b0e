"""Examples by Google's rule, packed into batches of fixed shape, filled and masked.

An example is one contiguous span of a shard's tokens, cut in two segments: A, then B (maybe
empty). All random decisions are draws from counters, so a plan and its batches are a pure function
of (shard, settings, key).
"""

from dataclasses import dataclass

import numpy as np

from fastelectra.data.batch import BatchShape, masked_count
from fastelectra.data.counters import below, draw, key_of, permutation, uniform
from fastelectra.data.jit import njit

ONE_SEGMENT_SHARE = 0.1  # of the examples have no B
SHORT_SHARE = 0.05  # of the examples aim at a random length in [5, max_length]
MASK_SHARE = 0.85  # of the chosen positions become [MASK], the others keep their token
OPEN_BATCHES = 32  # that an example may still go to; more would fill them no better


@dataclass(frozen=True)
class Plan:
    """The examples of a shard in one epoch and the batches they are packed into."""

    tokens: np.ndarray  # uint16 | uint32 [N]: the shard
    starts: np.ndarray  # int64 [E]: first token of A
    first: np.ndarray  # int32 [E]: tokens of A
    second: np.ndarray  # int32 [E]: tokens of B
    quota: np.ndarray  # int32 [E]: positions to choose, k of ELECTRA's rule
    key: np.uint64  # of the masking draws
    order: np.ndarray  # int64 [E]: examples, batch after batch
    bounds: np.ndarray  # int64 [batches + 1]: where each batch begins in `order`
    masked: np.ndarray  # int64 [batches]: chosen positions
    real: np.ndarray  # int64 [batches]: real tokens, [CLS] and [SEP] included

    def __len__(self) -> int:
        return len(self.bounds) - 1


def make_plan(
    tokens: np.ndarray,
    lines: np.ndarray,
    max_length: int,
    mask_fraction: float,
    google_parity: bool,
    shape: BatchShape,
    key: np.uint64,
) -> Plan:
    """Cut, choose how much to mask, shuffle and pack; `key` decides everything random."""
    starts, first, second = cut_examples(lines, max_length, not google_parity, key_of(key, 0))
    lengths = first + second + np.where(second > 0, 3, 2).astype(np.int32)
    quotas = np.array([masked_count(n, mask_fraction) for n in range(max_length + 1)], np.int32)
    quota = np.minimum(quotas[lengths], first + second)
    masking_key = key_of(key, 1)
    chosen = _count_distinct(first + second, quota, masking_key) if google_parity else quota
    order, bounds = pack(
        lengths, chosen, permutation(key_of(key, 2), len(starts)),
        shape.tokens, shape.sequences, shape.masked,
    )  # fmt: skip
    masked, real = (_sums(values[order], bounds) for values in (chosen, lengths))
    return Plan(tokens, starts, first, second, quota, masking_key, order, bounds, masked, real)


def mean_length(lines: np.ndarray, max_length: int) -> float:
    """Of the examples that a shard's lines make, with [CLS] and [SEP]."""
    _, first, second = cut_examples(lines, max_length, True, key_of(0, 0))
    return float(np.mean(first + second + np.where(second > 0, 3, 2)))


def _sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.diff(running[bounds])


@njit
def cut_examples(lines, max_length, keep_tail, key):
    """Google's segment rule over `lines` (uint32: tokens of each line, 0 = end of document).

    Lines are collected until they reach the target length or the document ends. The first line
    goes to A, the others too while A stays below its target; the line that overflows A goes there
    with probability ½, everything after it to B. What does not fit is the next example's first
    line if `keep_tail`, else it is dropped. (Google's code lets a short line still join A after B
    has begun, out of order; here an example stays one span.)

    Returns starts (int64 [E]), lengths of A and of B (int32 [E]).
    """
    most = 1  # every example but the last of a document uses two tokens at least
    for length in lines:
        most += length // 2 + 1
    starts = np.empty(most, np.int64)
    firsts = np.empty(most, np.int32)
    seconds = np.empty(most, np.int32)
    count = 0
    target = max_length
    position = 0  # of the next example's first token
    line, offset = 0, 0  # where that token lies: tokens before `offset` of `line` are used up
    while line < len(lines):
        if lines[line] == 0:
            line += 1
            continue
        one_segment = uniform(key, 4 * count) < ONE_SEGMENT_SHARE
        overflow_to_first = uniform(key, 4 * count + 1) < 0.5
        first_target = (target - 3) // 2
        first, second = 0, 0
        last = line
        while last < len(lines) and lines[last] != 0 and first + second < target:
            length = np.int64(lines[last]) - (offset if last == line else 0)
            joins_first = first + length < first_target or (
                first < first_target and overflow_to_first
            )
            if one_segment or first == 0 or (second == 0 and joins_first):
                first += length
            else:
                second += length
            last += 1
        used = first + second
        first = min(first, max_length - 2)
        second = min(second, max(0, max_length - 3 - first))
        if keep_tail:
            used = first + second
        starts[count] = position
        firsts[count] = first
        seconds[count] = second
        if uniform(key, 4 * count + 2) < SHORT_SHARE:
            target = 5 + below(key, 4 * count + 3, max_length - 4)
        else:
            target = max_length
        count += 1
        position += used
        offset += used
        while line < len(lines) and lines[line] != 0 and offset >= lines[line]:
            offset -= np.int64(lines[line])
            line += 1
    return starts[:count].copy(), firsts[:count].copy(), seconds[:count].copy()


@njit
def pack(lengths, chosen, arrival, tokens, sequences, masked):
    """Best fit: each example, in order of arrival, to the fullest open batch that has room.

    A batch holds at most `tokens` tokens, `sequences` examples and `masked` chosen positions.
    Returns the examples batch after batch (int64 [E]) and where each batch begins (int64 [B + 1]).
    """
    batch_of = np.empty(len(arrival), np.int64)
    room = np.empty((OPEN_BATCHES, 3), np.int64)  # tokens, sequences, chosen positions left
    batch_in = np.empty(OPEN_BATCHES, np.int64)
    open_batches, batches = 0, 0
    for example in arrival:
        best, fullest = -1, 0
        for slot in range(open_batches):
            if room[slot, 0] < room[fullest, 0]:
                fullest = slot
            fits = (
                room[slot, 0] >= lengths[example]
                and room[slot, 1] >= 1
                and room[slot, 2] >= chosen[example]
            )
            if fits and (best < 0 or room[slot, 0] < room[best, 0]):
                best = slot
        if best < 0:
            best = open_batches if open_batches < OPEN_BATCHES else fullest
            open_batches = max(open_batches, best + 1)
            room[best, 0], room[best, 1], room[best, 2] = tokens, sequences, masked
            batch_in[best] = batches
            batches += 1
        room[best, 0] -= lengths[example]
        room[best, 1] -= 1
        room[best, 2] -= chosen[example]
        batch_of[example] = batch_in[best]
    bounds = np.zeros(batches + 1, np.int64)
    for batch in batch_of:
        bounds[batch + 1] += 1
    bounds = np.cumsum(bounds)
    order, place = np.empty_like(batch_of), bounds.copy()
    for example in arrival:
        order[place[batch_of[example]]] = example
        place[batch_of[example]] += 1
    return order, bounds


@njit
def choose(key, candidates, quota, replacement, chosen):
    """Mark `quota` of `candidates` in chosen (bool [≥ candidates]), uniformly; returns how many.

    With replacement duplicates collapse, so fewer may be marked.
    """
    count = 0
    if replacement:
        chosen[:candidates] = False
        for i in range(quota):
            candidate = below(key, 3 * i, candidates)
            count += not chosen[candidate]
            chosen[candidate] = True
        return count
    for candidate in range(candidates):  # selection sampling: exact count, ascending, one pass
        left = candidates - candidate
        chosen[candidate] = below(key, 3 * candidate, left) < quota - count
        count += chosen[candidate]
    return count


@njit
def _count_distinct(candidates, quota, key):
    counts = np.empty_like(quota)
    chosen = np.empty(candidates.max() if len(candidates) else 0, np.bool_)
    for example in range(len(quota)):
        counts[example] = choose(
            draw(key, example), candidates[example], quota[example], True, chosen
        )
    return counts


@njit
def fill(tokens, examples, starts, first, second, quota, replacement, key, special, ids, masks,
         boundaries, uniforms):  # fmt: skip
    """Write a batch of `examples` (indices into starts, first, second, quota) into zeroed arrays.

    special: [CLS], [SEP], [MASK] ids. ids: int32 [3, T] (tokens, segments, positions). masks:
    int32 [3, M] (positions, inputs, labels), preset to padding. boundaries: int32 [S + 1].
    uniforms: float32 [M].
    """
    end, count = 0, 0
    chosen = np.empty(ids.shape[1], np.bool_)
    for i, example in enumerate(examples):
        begin, example_key = end, draw(key, example)
        candidates = first[example] + second[example]
        choose(example_key, candidates, quota[example], replacement, chosen)
        ids[0, end] = special[0]
        end += 1
        for candidate in range(candidates):
            if candidate == first[example]:
                ids[0, end] = special[1]
                ids[2, end] = end - begin
                end += 1
            token = np.int32(tokens[starts[example] + candidate])
            ids[0, end] = token
            ids[1, end] = candidate >= first[example]
            ids[2, end] = end - begin
            if chosen[candidate]:
                hidden = uniform(example_key, 3 * candidate + 1) < MASK_SHARE
                masks[0, count] = end
                masks[1, count] = special[2] if hidden else token
                masks[2, count] = token
                uniforms[count] = uniform(example_key, 3 * candidate + 2)
                count += 1
            end += 1
        ids[0, end] = special[1]
        ids[1, end] = second[example] > 0
        ids[2, end] = end - begin
        end += 1
        boundaries[i + 1] = end
    boundaries[len(examples) + 1 :] = end
