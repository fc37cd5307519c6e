"""Several documents in one row without seeing each other: best-fit packing and its labels.

A packed row is equal to its documents run alone only if three things hold together
(arXiv 2407.09105): attention stays inside a document, positions restart with it, and its first
token is nobody's target. `PackedBatch` carries all three. B rows, T tokens a row.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

IGNORE = -100  # label that no loss counts (Hugging Face convention)
NO_DOCUMENT = -1  # document id of padding


@dataclass(frozen=True)
class PackedBatch:
    """Rows of packed documents, int64 [B, T]; labels unshifted, -100 where nothing is learnt."""

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    document_ids_BT: torch.Tensor

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> "PackedBatch":
        """Rows [start, stop): a micro-batch."""
        return self._each(lambda tensor: tensor[start:stop])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        tensors = {k: change(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)

    @property
    def row_shape(self) -> tuple[int, int]:
        """Rows, and tokens of a row."""
        return tuple(self.input_ids_BT.shape)

    @property
    def num_targets(self) -> int:
        """Tokens that some loss counts (labels that are not -100)."""
        return int((self.labels_BT != IGNORE).sum())


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` grouped into bins of at most `capacity`.

    Longest first, each into the fullest bin that still has room (the oldest of equals), so the
    result does not depend on anything but the arguments. O(n log n) time for n documents.
    Raises ValueError when a length is below 1 or above `capacity`.
    """
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}; a row holds at least one token")
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"document {index} has {length} tokens, rows hold 1 to {capacity}; "
                "drop empty documents and truncate or split long ones before packing"
            )
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # room left -> bins, ascending
    rooms: list[int] = []  # the keys of open_bins, ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            chosen, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            chosen = open_bins[room].pop(0)
            if not open_bins[room]:
                del open_bins[room], rooms[at]
        bins[chosen].append(index)
        room -= length
        if room:
            if room not in open_bins:
                open_bins[room] = []
                bisect.insort(rooms, room)
            bisect.insort(open_bins[room], chosen)
    return bins


def pack_rows(
    docs: Sequence[tuple[Sequence[int], Sequence[int] | None]], capacity: int, pad_id: int
) -> PackedBatch:
    """Pack (ids, mask) documents into rows of `capacity` tokens.

    mask is 1 where a token is a target, None for all; `document_ids_BT` holds the index into
    `docs` (-1 on padding), so per-document sums are a scatter-add. Raises ValueError when a mask
    has another length than its ids or a document does not fit.
    """
    if not docs:
        raise ValueError("pack_rows got no documents")
    for index, (ids, mask) in enumerate(docs):
        if mask is not None and len(mask) != len(ids):
            raise ValueError(f"document {index}: {len(ids)} ids but {len(mask)} mask entries")
    bins = pack_best_fit([len(ids) for ids, _ in docs], capacity)
    shape = (len(bins), capacity)
    input_ids_BT = np.full(shape, pad_id, dtype=np.int64)
    labels_BT = np.full(shape, IGNORE, dtype=np.int64)
    position_ids_BT = np.zeros(shape, dtype=np.int64)
    document_ids_BT = np.full(shape, NO_DOCUMENT, dtype=np.int64)
    for row, members in enumerate(bins):
        start = 0
        for index in members:
            ids, mask = docs[index]
            span = slice(start, start + len(ids))
            input_ids_BT[row, span] = ids
            labels_BT[row, span] = ids if mask is None else np.where(mask, ids, IGNORE)
            labels_BT[row, start] = IGNORE  # the token before it belongs to another document
            position_ids_BT[row, span] = np.arange(len(ids))
            document_ids_BT[row, span] = index
            start += len(ids)
    arrays = (input_ids_BT, labels_BT, position_ids_BT, document_ids_BT)
    return PackedBatch(*(torch.from_numpy(array) for array in arrays))
