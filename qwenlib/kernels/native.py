"""`native.c` compiled for the machine at hand and called through ctypes.

Shapes: T tokens, N rows, W wanted tokens, G key/value heads, K head dim, S cache, V vocabulary.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qwenlib.c_build import compiled

_SOURCE = Path(__file__).with_suffix(".c")
_BLOCK, _LANES, _ROWS = 32, 16, 12  # as in the C file, for the widest registers


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "norm_1", "qkv", "qkv_bias", "out", "norm_2", "gate_up", "down", "keys", "values"
        )
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "layers", "hidden", "heads", "groups", "head_dim", "ffn", "vocabulary", "columns"
            )
        ),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "head", "cos", "sin")),
        ("layer", ctypes.POINTER(_Layer)),
    ]  # fmt: skip


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "wanted", "threads", "own_size")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "ids", "row", "column", "first", "want", "logits", "x", "qkv", "mixed", "hidden",
                "own",
            )
        ),
    ]  # fmt: skip


def library() -> ctypes.CDLL | None:
    """The compiled file; None without a C compiler."""
    loaded = compiled(_SOURCE)
    if loaded is not None:
        loaded.qwen_forward.argtypes = [ctypes.POINTER(_Model), ctypes.POINTER(_Call)]
        loaded.qwen_forward.restype = None
    return loaded


def can_run(tensors: Sequence[Tensor], head_dim: int) -> bool:
    """Whether `Forward` takes a model of these parameters, on this machine."""
    plain = all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors
    )
    whole = all(len(t) >= _ROWS for t in tensors if t.dim() == 2) and head_dim % _LANES == 0
    return plain and whole and library() is not None


class Forward:
    """A dense model's forward pass over any tokens of a batch, each appended to its row's cache.

    layers: for each layer norm_1, qkv and its bias, out, norm_2, gate_up, down; qkv and gate_up
    are the stacked matrices. cos_SK, sin_SK: tables of `model.rope.rope_tables` for positions 0 to
    S - 1. The tensors are read where they lie; they must stay there as long as this object is used.
    """

    def __init__(
        self, layers: Sequence[Sequence[Tensor]], embedding_VD: Tensor, norm_D: Tensor,
        head_VD: Tensor, cos_SK: Tensor, sin_SK: Tensor, groups: int, eps: float,
    ):  # fmt: skip
        K = cos_SK.shape[1]
        out_DX, down_DF = layers[0][3], layers[0][6]
        self.kept = layers, embedding_VD, norm_D, head_VD, cos_SK, sin_SK
        self.layer = (_Layer * len(layers))()
        for place, tensors in zip(self.layer, layers):
            for (name, _), tensor in zip(_Layer._fields_, tensors):
                setattr(place, name, tensor.data_ptr())
        self.model = _Model(
            layers=len(layers), hidden=embedding_VD.shape[1], heads=out_DX.shape[1] // K,
            groups=groups, head_dim=K, ffn=down_DF.shape[1], vocabulary=head_VD.shape[0],
            eps=eps, scale=K**-0.5, embedding=embedding_VD.data_ptr(), norm=norm_D.data_ptr(),
            head=head_VD.data_ptr(), cos=cos_SK.data_ptr(), sin=sin_SK.data_ptr(),
            layer=self.layer,
        )  # fmt: skip
        self.room: Tensor | None = None

    def __call__(
        self, ids_T: Tensor, row_T: Tensor, column_T: Tensor, first_N: Tensor, want_W: Tensor,
        keys: Sequence[Tensor], values: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        """Logits (W, V) of the tokens numbered want_W.

        row_T, column_T: each token's row and column of the cache. first_N: the column of each row's
        first real token; a token's position is its distance from it. keys, values: the cache of
        each layer, (N, G, S, K) in fp32, contiguous, written in place. Raises IndexError for a
        token outside the vocabulary.
        """
        ids_T, row_T, column_T, first_N, want_W = (
            t.long().contiguous() for t in (ids_T, row_T, column_T, first_N, want_W)
        )
        model, T, W = self.model, len(ids_T), len(want_W)
        ids = ids_T.tolist()
        if min(ids) < 0 or max(ids) >= model.vocabulary:
            raise IndexError(
                f"a token is outside 0 to {model.vocabulary - 1}, the embedding's rows"
            )
        model.columns = keys[0].shape[2]
        for place, k_NGSK, v_NGSK in zip(self.layer, keys, values):
            place.keys, place.values = k_NGSK.data_ptr(), v_NGSK.data_ptr()
        threads, columns = torch.get_num_threads(), -(-T // _BLOCK) * _BLOCK
        width = (model.heads + 2 * model.groups) * model.head_dim
        own = max(_BLOCK * model.hidden, model.columns + _LANES)
        sizes = (
            columns * model.hidden, columns * width, columns * model.heads * model.head_dim,
            columns * model.ffn, threads * own,
        )  # fmt: skip
        # Kept between steps, but not a long prompt's. Zeros: what happens to lie there may be slow
        # to compute with.
        if self.room is None or not sum(sizes) <= self.room.numel() <= 8 * sum(sizes):
            self.room = torch.zeros(sum(sizes))
        x, qkv, mixed, hidden, own_room = (
            part.data_ptr() for part in self.room[: sum(sizes)].split(sizes)
        )
        logits_WV = torch.empty(W, model.vocabulary)
        call = _Call(
            tokens=T, wanted=W, threads=threads, own_size=own, ids=ids_T.data_ptr(),
            row=row_T.data_ptr(), column=column_T.data_ptr(), first=first_N.data_ptr(),
            want=want_W.data_ptr(), logits=logits_WV.data_ptr(), x=x, qkv=qkv, mixed=mixed,
            hidden=hidden, own=own_room,
        )  # fmt: skip
        library().qwen_forward(ctypes.byref(model), ctypes.byref(call))
        return logits_WV
