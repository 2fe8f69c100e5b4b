"""What the target makes of a tree's nodes, in a C call or two a node: `target.c` behind `TargetRows`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.sampling import Choices, finite_peak
from sequoia.engine.siblings import Ids, Reals, Target
from sequoia.engine.tree_logits import Logits
from sequoia.engine.verification import TargetRows
from sequoia.rules import COUPLED, GREEDY
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import TokenTree

_BROKEN, _UNKNOWN = -1, -2  # as in target.c
_NO_IDS = np.empty(0, np.int64)


class _Parameters(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("vocab_size", "top_k")),
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "least_log")),
        ("seed", ctypes.c_uint64),
    )


class _Functions:
    """Of target.c."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.target, self.draw, self.coupled = library.sequoia_target, library.sequoia_draw, library.sequoia_coupled
        for function in (self.target, self.draw, self.coupled):
            function.restype = ctypes.c_int64


class _Row:
    """One node's logits, (vocabulary,) float32. A method's None says that more tokens are left than C looks at."""

    def __init__(self, functions: _Functions, parameters: _Parameters, logits: Tensor) -> None:
        self._functions, self._logits = functions, logits
        self._start = ctypes.byref(parameters), ctypes.c_void_p(logits.data_ptr())

    def target(self, ids: Ids) -> tuple[Reals, float] | None:
        """p at distinct ids, and the mass of all other tokens."""
        values, outside = np.empty(len(ids)), ctypes.c_double()
        results = ctypes.c_void_p(values.ctypes.data), ctypes.byref(outside)
        found = self._functions.target(*self._start, *_array(ids), *results)
        return None if self._checked(found) is None else (values, outside.value)

    def draw(self, ids: Ids, share: float) -> int | None:
        """The token outside ids where the running sum of p reaches that share of its mass there."""
        return self._checked(self._functions.draw(*self._start, *_array(ids), ctypes.c_double(share)))

    def coupled_token(self, position: int) -> int | None:
        """`sampling.coupled_token`."""
        return self._checked(self._functions.coupled(*self._start, ctypes.c_int64(position)))

    def _checked(self, found: int) -> int | None:
        if found == _BROKEN:
            finite_peak(float(self._logits.max()))
        return None if found == _UNKNOWN else found


class _Target:
    """`siblings.Target` of a row; `whole` makes p where the row does not know it."""

    def __init__(self, row: _Row, whole: Callable[[], Target]) -> None:
        self._row, self._make_whole = row, whole
        self._whole: Target | None = None
        self._outside = 0.0

    def at(self, ids: Ids) -> tuple[Reals, float]:
        """As the protocol has it."""
        if (found := self._row.target(ids)) is None:
            self._whole = self._make_whole()
            return self._whole.at(ids)
        self._outside = found[1]
        return found

    def draw(self, ids: Ids, values: Reals, scale: float, choices: Choices) -> int:
        """As the protocol has it: whether it is a candidate, and then which token."""
        if self._whole is not None:
            return self._whole.draw(ids, values, scale, choices)
        index = choices.draw(torch.from_numpy(np.append(values, scale * self._outside)))
        if index < len(ids):
            return int(ids[index])
        token_id = self._row.draw(ids, choices.uniform())
        assert token_id is not None, "a row that was known a moment ago"
        return token_id


class NativeRows(TargetRows):
    """`TargetRows` of logits in the host's memory, (size, vocabulary) float32.

    Numpy's are greedy rows, rows that something is added to before the temperature, and cuts that leave many tokens.
    """

    def __init__(
        self,
        functions: _Functions,
        tree: TokenTree,
        logits: Logits,
        decoding: Decoding,
        committed: tuple[int, ...],
        choices: Choices,
    ) -> None:
        super().__init__(tree, logits, decoding, committed, choices)
        self._functions, self._parameters = functions, _parameters(decoding.sampling, logits.shape[1])

    def token(self, node: int) -> int:
        """As `TargetRows` has it."""
        token_id = None
        if self._decoding.rule is COUPLED and self._is_plain(node):
            token_id = self._row(node).coupled_token(self._path(node).position)
        elif self._decoding.rule is not GREEDY and self._is_plain(node):
            token_id = self._row(node).draw(_NO_IDS, self._choices.uniform())
        return super().token(node) if token_id is None else token_id

    def target(self, node: int) -> Target:
        """As `TargetRows` has it."""
        whole = partial(super().target, node)
        return _Target(self._row(node), whole) if self._is_plain(node) else whole()

    def _row(self, node: int) -> _Row:
        return _Row(self._functions, self._parameters, self._logits[node])

    def _is_plain(self, node: int) -> bool:
        return not self._decoding.sampling.adjusts(self._path(node).num_generated)


def native_rows(library: ctypes.CDLL) -> Callable[..., NativeRows]:
    """`NativeRows`, but for its first argument."""
    return partial(NativeRows, _Functions(library))


def _array(ids: Ids) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return ctypes.c_void_p(ids.ctypes.data), ctypes.c_int64(len(ids))


def _parameters(sampling: Sampling, vocab_size: int) -> _Parameters:
    least_log = math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf
    top_k = sampling.top_k if sampling.top_k < vocab_size else 0
    return _Parameters(vocab_size, top_k, sampling.temperature, sampling.top_p, least_log, sampling.seed or 0)
