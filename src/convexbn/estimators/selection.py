"""Scores of candidates on the folds of a cross-validation: of all, or of those that a search asks for."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from convexbn._types import Bool, Float
from convexbn.estimators.counter import counter
from convexbn.estimators.fold import Fold, Score

#: Steps of a search along the weight decays, in candidates, and how many candidates it scores a line, as a rule.
_STEPS, _TAKEN = (6, 3), 6


class SelectionProgress(NamedTuple):
    """State of a cross-validation after fits on its folds.

    A search may end before ``total`` fits. ``best_score`` is the best mean score so far, NaN before the first.
    """

    finished: int
    total: int
    seconds: float
    best_score: float

    @property
    def seconds_left(self) -> float:
        """Seconds that the remaining fits take at the mean rate so far."""
        return self.seconds / max(self.finished, 1) * (self.total - self.finished)


Report = Callable[[SelectionProgress], object]


@contextmanager
def reporter(callback: Report | None, *, verbose: bool) -> Iterator[Report]:
    """Context of a callback that shows progress on standard error, if wanted, and calls another one.

    Nothing is shown in a worker: a process or thread beside the main one.
    """
    calls = [] if callback is None else [callback]
    worker = multiprocessing.parent_process() is not None or threading.current_thread() is not threading.main_thread()
    if not verbose or worker:
        yield lambda progress: [call(progress) for call in calls]
        return
    with counter(sys.stderr, interval=1.0) as show:

        def told(progress: SelectionProgress) -> None:
            state = f"best score {progress.best_score:.4g}   at most {progress.seconds_left:.0f} s left"
            show(progress.finished, progress.total, state)

        yield lambda progress: [call(progress) for call in (told, *calls)]


@dataclass
class FoldScores:
    """Candidates and their scores on all folds.

    Parameters
    ----------
    candidates, folds : list of dict, list of Fold
    n_decays : int
        Candidates come in lines of so many weight decays, from large to small if they are searched.
    n_jobs, report : int or None, callable
        Folds to run at once, by joblib, and a callback for ``SelectionProgress``.

    Attributes
    ----------
    scores, gaps : ndarray (n_candidates, n_splits)
        NaN where there is none.
    failures : list of str
        Folds and candidates that failed, and why.
    """

    candidates: list[dict[str, Any]]
    folds: list[Fold]
    n_decays: int
    n_jobs: int | None
    report: Report
    scores: Float = field(init=False)
    gaps: Float = field(init=False)
    failures: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.scores, self.gaps = np.full((2, len(self.candidates), len(self.folds)), np.nan)
        self._started, self._finished, self._known = time.monotonic(), 0, set[int]()

    @property
    def scored(self) -> Bool:
        """Folds that have a score: the others are left out, (n_splits,)."""
        lacking: Bool = np.all(np.isnan(self.scores), axis=0)
        return ~lacking

    @property
    def means(self) -> Float:
        """Mean scores (n_candidates,); NaN for a candidate that lacks a score that others have."""
        kept = self.scores[:, self.scored]
        return kept.mean(axis=1) if kept.size else np.full(len(kept), np.nan)

    def run(self, *, search: bool) -> None:
        """Score all candidates, or search each line of weight decays from the best of the line before."""
        if not search:
            self._score(range(len(self.candidates)), total=self.scores.size, last=True)
            return
        starts, best = range(0, len(self.candidates), self.n_decays), self.n_decays // 2 + 1
        for line, start in enumerate(starts):
            total = (len(starts) - line) * _TAKEN * len(self.folds)
            best = self._search(start, best, self._finished + total)

    def _search(self, start: int, best: int, total: int) -> int:
        """Pattern search along a line: move to the better neighbour while there is one, then halve the step."""
        for step in _STEPS:
            former = None
            while best != former:
                former = best
                near = [i for i in (best, best - step, best + step) if 0 <= i < self.n_decays]
                self._score([start + i for i in sorted(near)], total)  # from large to small is fastest
                best = near[int(np.argmax(np.nan_to_num(self.means[[start + i for i in near]], nan=-np.inf)))]
        return best

    def _score(self, asked: Sequence[int], total: int, *, last: bool = False) -> None:
        """Scores of some candidates on all folds, unless they are known; ``last``: no others will be asked for."""
        if not (new := [i for i in asked if i not in self._known]):
            return
        self._known |= {*new}
        chosen, before = [self.candidates[i] for i in new], self._finished

        def tick() -> None:
            self._finished += 1
            most = max(total, before + len(new) * len(self.folds))
            best = np.nan_to_num(self.means, nan=-np.inf).max()
            seconds = time.monotonic() - self._started
            self.report(SelectionProgress(self._finished, most, seconds, best if np.isfinite(best) else np.nan))

        for split, found in enumerate(self._found(chosen, last=last)):
            for i, score in zip(new, found, strict=True):
                self.scores[i, split], self.gaps[i, split] = score.value, score.gap
                self._note(i, split, score)
                tick()

    def _found(self, candidates: list[dict[str, Any]], *, last: bool) -> Iterator[Iterable[Score]]:
        """Scores of candidates on each fold, as they come."""
        from joblib import Parallel, delayed, effective_n_jobs

        if effective_n_jobs(self.n_jobs) > 1:
            work = (delayed(_scores)(fold, candidates, last) for fold in self.folds)
            for split, (fold, found) in enumerate(Parallel(n_jobs=self.n_jobs, return_as="generator")(work)):
                self.folds[split] = fold
                yield found
            return
        for fold in self.folds:
            yield fold.scores(candidates)
            if last:
                fold.forget()

    def _note(self, candidate: int, split: int, score: Score) -> None:
        """Note why a score is missing: of a fold that failed once."""
        if not np.isnan(score.value):
            return
        settings = ", ".join(f"{name}={value!r}" for name, value in self.candidates[candidate].items())
        place = f"fold {split}" if score.of_fold else f"fold {split}, {settings}"
        failure = f"{place}: {score.failure or 'its score is not a number'}"
        if failure not in self.failures:
            self.failures.append(failure)


def _scores(fold: Fold, candidates: list[dict[str, Any]], last: bool) -> tuple[Fold, list[Score]]:
    """What a worker sends back: the fold with what it has fitted, and the scores."""
    found = [*fold.scores(candidates)]
    if last:
        fold.forget()
    return fold, found
