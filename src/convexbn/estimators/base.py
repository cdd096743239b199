"""Base of ConvexBNClassifier and ConvexBNRegressor: the programs behind scikit-learn's interface."""

from __future__ import annotations

import os
from collections.abc import Callable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Self
from weakref import WeakKeyDictionary

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted

from convexbn._threads import blas_threads
from convexbn._types import Float, FloatMatrix
from convexbn.certificate.certificate import Certificate
from convexbn.certificate.dual_bounds import NOTHING_KNOWN, KnownBound
from convexbn.certificate.status import Status
from convexbn.data.canonical import canonical_rows, fingerprint
from convexbn.data.convolution import Convolution
from convexbn.data.warn import one_warning, warn
from convexbn.estimators import persistence
from convexbn.estimators.parameters import Choices, NetworkParameters, parameters
from convexbn.estimators.validation import check_finite, checked_data, checked_rows, refuse_containers
from convexbn.program.gated import GatedProgram
from convexbn.program.losses import LOSSES, LossKind
from convexbn.solvers.base import Budget, Progress
from convexbn.training.fit import (
    GATES_SHARE,
    SEARCH_SHARE,
    ReluSettings,
    chosen_weight_decay,
    fit_gated,
    fit_relu,
    judge_on,
)  # fmt: skip
from convexbn.training.held_out import AUTO_FRACTION
from convexbn.training.training_set import TrainingSet

if TYPE_CHECKING:
    from convexbn.training.relu_conversion import Conversion

#: ``spectral_filter="auto"`` of gated networks on rows.
AUTO_FILTER = 0.3


#: Parameters that choose a network of a ReLU program and the effort, not the program.
OF_THE_SEARCH = {
    "callback", "gates", "max_iter", "n_gates", "n_starts", "proof_time", "random_state", "solver", "time_limit", "tol",
    "weight_decay", "width",
}  # fmt: skip


#: Questions about all patterns that fits of this process have answered, and their bounds: no file can alter these.
_PROVED: WeakKeyDictionary[BaseConvexBN, tuple[Any, KnownBound]] = WeakKeyDictionary()


@parameters
class BaseConvexBN(NetworkParameters):
    """Base of the estimators: fit, hidden activations, certificate, persistence."""

    weight_decay: float | str = "auto"
    n_gates: int = 100
    rank: int | float | None = None
    spectral_filter: float | str | None = "auto"
    callback: Callable[[Progress], object] | None = None

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **NetworkParameters._parameter_constraints,
        "weight_decay": [Choices({"auto"}), Interval(Real, 0, None, closed="neither")],
        "n_gates": [Interval(Integral, 1, None, closed="left")],
        "rank": [Interval(Integral, 1, None, closed="left"), Interval(Real, 0, 1, closed="right"), None],
        "spectral_filter": [Choices({"auto"}), Interval(Real, 0, None, closed="neither"), None],
        "callback": [callable, None],
    }

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train to a certified optimum; a failure of any kind leaves the estimator unchanged.

        Parameters
        ----------
        X, y : array-like (n, d), (n,) or (n, K)
            Features, and class labels or targets.
        sample_weight : array-like (n,), optional
            Equal to repeating rows.
        """
        self._validate_params()
        self._warn_of_unused()
        before = self.__dict__.copy()
        try:
            budget = Budget(self.time_limit, self.callback)
            with one_warning():
                data, labels = self._prepare(X, y, sample_weight)
                kept = {name: value for name, value in self.__dict__.items() if name not in ("columns_", "source_")}
                self.__dict__ = kept | self._train(data, budget) | labels  # all at once, for other threads
                self._warn_if_open()
        except BaseException:
            self.__dict__ = before
            raise
        return self

    def _warn_if_open(self) -> None:
        """Warn if the network is not certified."""
        proof = self.certificate_
        if proof.status not in (Status.CERTIFIED, Status.TRIVIAL):
            warn(f"{proof.status.value}: {proof.sentence}", ConvergenceWarning)

    def transform(self, X: Any) -> Float:
        """Hidden activations, one a neuron (of a convolution one a neuron and region): (n, d) -> (n, n_neurons)."""
        rows = self._checked_rows(X)
        with np.errstate(all="ignore"):
            return self.network_.hidden(rows)

    @property
    def feature_importances_(self) -> Float:
        """Shares of the features in the outputs (d,), whatever their units; their sum is 1.

        Of feature ``i`` it is ``sum_j |w_ij| deviation_i gamma_j ||c_j||`` over all: what one standard deviation of the
        training rows moves the neurons, in deviations of theirs, times the weight of each neuron in the outputs. It
        measures the network, not causes: features that tell the same share what one of them would have.
        """
        check_is_fitted(self)
        if self.convolution is not None:
            raise AttributeError("feature_importances_ is for features: a convolution weighs the places of a patch.")
        if not hasattr(self, "_deviations"):
            raise AttributeError("feature_importances_ is not in the file of this model, an older one: fit it again.")
        return self.network_.importances(self._deviations)

    def _outputs(self, X: Any, fitted: dict[str, Any]) -> Float:
        """Outputs of one fit; a fit in another thread replaces its attributes all at once."""
        rows = self._checked_rows(X)
        with np.errstate(all="ignore"):
            return fitted["network_"].predict(rows)

    def certify(self, X: Any, y: Any, sample_weight: Any = None, *, time_limit: float | None = None) -> Certificate:
        """Judge the stored network on its training rows or others.

        Only the question comes from the model (gates, loss, weight decay, rank, spectral filter). Statistics, objective
        and bound are recomputed from the given rows. ReLU networks are judged over all patterns. On the rows of a fit
        in this process the bound is at least that of the fit; a certificate that a file claims counts for nothing.

        Parameters
        ----------
        X, y, sample_weight : array-like
        time_limit : float, optional
            Seconds for the bounds over all patterns. By default ``proof_time``, else the ``time_limit`` of the model,
            and without either a stated amount of work.
        """
        limits = (time_limit, self.proof_time, self.time_limit)
        seconds = next((limit for limit in limits if limit is not None), None)
        if seconds is not None and not seconds >= 0:
            raise ValueError(f"time_limit must not be negative, got {seconds}.")
        data = self._training_rows(X, y, sample_weight)
        with blas_threads(len(data.X)):
            if self.gates_ is None:
                program: Any = data.relu_program(self.weight_decay_)
            else:
                program = data.gated_program(self.gates_, self.gate_offsets_, self.weight_decay_)
            return judge_on(
                data, self.network_, program, tol=self.tol, own_rows=data.fingerprint == self.fingerprint_,
                deadline=Budget(seconds).deadline, known=self._known_bound(data),
            )  # fmt: skip

    def _question(self, data: TrainingSet, weight_decay: float) -> tuple[Any, ...]:
        """Everything that the program of all patterns depends on, in a form that can be compared."""
        values = self.get_params(deep=False)
        asked = [(name, values[name]) for name in sorted(values.keys() - OF_THE_SEARCH)]
        return data.fingerprint, data.whitening.rank, weight_decay, asked

    def _known_bound(self, data: TrainingSet) -> KnownBound:
        """Bound that a fit of this estimator has proved for the same program."""
        question, known = _PROVED.get(self, (None, NOTHING_KNOWN))
        return known if question == self._question(data, self.weight_decay_) else NOTHING_KNOWN

    def to_relu(self, X: Any, y: Any, sample_weight: Any = None, *, unrealisable: str = "refuse") -> Conversion:
        """Convert the gated network to a plain ReLU network with the same outputs on its training rows.

        Each linear neuron of a gate becomes the difference of two ReLU neurons of its cone, of smallest norms. The
        outputs stay and the gates go: the objective, which is returned before and after, rises, often many times over.
        To train a good ReLU network use ``activation="relu"``.

        Parameters
        ----------
        X, y, sample_weight : array-like
            The rows that the model was trained on.
        unrealisable : {"refuse", "nearest"}, default="refuse"
            With ``rank`` gates may cut the rows in ways that no direction of the whitened data does. Raise an error
            with their number, or solve the program again with the nearest gates that are realised.

        Returns
        -------
        Conversion
            With ``network``, ``certificate``, the objectives, ``n_unrealisable`` and ``output_error``.

        Raises
        ------
        ValueError
            For ReLU models, other rows than those of the training, and gates that are not realised.
        """
        from convexbn.training.relu_conversion import to_relu

        if self.convolution is not None:
            raise ValueError("to_relu is for dense data: train a convolutional ReLU network with activation='relu'.")
        data = self._training_rows(X, y, sample_weight)
        if data.fingerprint != self.fingerprint_:
            raise ValueError("to_relu needs the rows that the model was trained on, and these are others.")
        with blas_threads(len(data.X)):
            return to_relu(
                data, self.network_, self.gates_, self.gate_offsets_, self.weight_decay_,
                tol=self.tol, unrealisable=unrealisable,
            )  # fmt: skip

    def fingerprint(self, X: Any, y: Any, sample_weight: Any = None) -> str:
        """Hash of rows, as ``fit`` stores it in ``fingerprint_``: independent of their order and repetition.

        Parameters
        ----------
        X, y, sample_weight : array-like
        """
        check_is_fitted(self)
        X, y, weights = self._checked_data(X, y, sample_weight, reset=False)
        return fingerprint(*canonical_rows(*self._weighed(X, self._encode_known(y), weights, self._classes)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a safetensors file; ``convexbn.load`` reads it.

        Parameters
        ----------
        path : path-like
            File to write, such as ``model.safetensors``; an existing one is replaced in one step. A ``callback`` is not
            saved, nor a ``random_state`` that is not an integer.

        Raises
        ------
        ValueError
            When the model is not fitted, or was changed after the fit to one that ``load`` would refuse, or the name
            is that of another kind of file, such as ``model.pkl``; nothing has been written.
        """
        persistence.save(self, path)

    def _training_rows(self, X: Any, y: Any, sample_weight: Any) -> TrainingSet:
        """Training set of rows for a fitted estimator."""
        check_is_fitted(self)
        X, y, weights = self._checked_data(X, y, sample_weight, reset=False)
        rows = self._weighed(X, self._encode_known(y), weights, self._classes)
        return self._training_set(*rows, self._layer)

    def _prepare(self, X: Any, y: Any, sample_weight: Any) -> tuple[TrainingSet, dict[str, Any]]:
        """Training set of rows to fit, and the fitted attributes that describe ``y``."""
        rows, y, weights = self._checked_data(X, y, sample_weight, reset=True)
        layer = None if self.convolution is None else self.convolution.for_inputs(X)
        Y, labels = self._encode_new(y)
        weighed = self._weighed(rows, Y, weights, labels.get("classes_"))
        return self._training_set(*weighed, layer), labels

    def _train(
        self,
        data: TrainingSet,
        budget: Budget,
        start: Any = None,
        drawn: tuple[Float, Float, GatedProgram] | None = None,
    ) -> dict[str, Any]:
        """Fitted attributes, optionally from a warm start (blocks or neurons) and with gates that were drawn before."""
        gates, offsets = None, None
        with blas_threads(len(data.X)):
            if self.activation == "relu":
                weight_decay, temperature = self._weight_decay_relu(data, budget)
                settings = ReluSettings(self.width, self.n_starts, self.max_iter)
                rng = np.random.default_rng(own_random_state(self.random_state).randint(2**31))
                fit = fit_relu(
                    data, weight_decay, solver=settings, tol=self.tol, budget=budget, rng=rng, start=start,
                    proof_time=self.proof_time,
                )  # fmt: skip
            else:
                gates, offsets, program = drawn or self._draw_gates(data, budget.until(GATES_SHARE))
                weight_decay, temperature = self._resolve_weight_decay(data, lambda: program, budget)
                fit = fit_gated(
                    data, program.with_weight_decay(weight_decay), (gates, offsets),
                    solver=self.solver, tol=self.tol, max_iter=self.max_iter, budget=budget, start=start,
                )  # fmt: skip
        if gates is None and fit.certificate.status is not Status.NUMERICAL:
            known = KnownBound(fit.certificate.lower_bound, fit.certificate.bound)
            _PROVED[self] = self._question(data, weight_decay), known
        return {
            "gates_": gates, "gate_offsets_": offsets, "weight_decay_": weight_decay, "network_": fit.network,
            "temperature_": temperature,
            "certificate_": fit.certificate, "history_": fit.history, "n_iter_": fit.n_iter,
            "rank_": data.whitening.rank, "fingerprint_": data.fingerprint, "_deviations": data.whitening.deviations,
        }  # fmt: skip

    def _max_weight_decay(self, data: TrainingSet, *, proved: bool) -> float | tuple[float, float]:
        """Largest useful weight decay of a gated network; of a ReLU network its estimate and upper bound, if proved."""
        with blas_threads(len(data.X)):
            if self.activation == "relu":
                return data.max_weight_decay_relu(proved=proved)
            return self._draw_gates(data)[2].max_weight_decay()

    def _draw_gates(self, data: TrainingSet, deadline: float | None = None) -> tuple[Float, Float, GatedProgram]:
        """Gates, their offsets and program; equal each time if ``random_state`` is an integer."""
        with blas_threads(len(data.X)):
            rng = own_random_state(self.random_state)
            return data.draw_gates(self.gates, self.n_gates, rng, linear=self.linear, deadline=deadline)

    def _weight_decay_relu(self, data: TrainingSet, budget: Budget) -> tuple[float, float | None]:
        """Weight decay and temperature of a ReLU network: those of a gated one, which max pooling does not have."""
        if data.readout.linear or not isinstance(self.weight_decay, str):

            def gated() -> GatedProgram:
                return self._draw_gates(data, budget.until(GATES_SHARE))[2]

            return self._resolve_weight_decay(data, gated, budget)
        largest, _ = data.max_weight_decay_relu(proved=False, deadline=budget.until(SEARCH_SHARE))
        return AUTO_FRACTION * largest or 1.0, None

    def _resolve_weight_decay(
        self, data: TrainingSet, program: Callable[[], GatedProgram], budget: Budget
    ) -> tuple[float, float | None]:
        """Weight decay of the parameter; for ``"auto"`` held-out rows choose one for a gated program.

        They also tell the temperature of the outputs of a classifier whose loss does not model probabilities.
        """
        if not isinstance(self.weight_decay, str):
            return float(self.weight_decay), None
        choice, loss = chosen_weight_decay(on_rows := program(), budget), LOSSES[self.loss_]
        if self._task == "regression" or loss.models_probabilities:
            return choice.weight_decay, None
        return choice.weight_decay, choice.temperature(on_rows.loss, data.target_offset)

    @property
    def _tau(self) -> float | None:
        """Spectral filter: ``"auto"`` is ``AUTO_FILTER`` for gated networks on rows, and none for others."""
        if not isinstance(self.spectral_filter, str):
            return self.spectral_filter
        return AUTO_FILTER if self.activation == "gated" and self.convolution is None else None

    @property
    def _layer(self) -> Convolution | None:
        """The convolution, after a fit with the shape of its inputs."""
        fitted = self.convolution is not None and hasattr(self, "network_")
        return self.network_.convolution if fitted else self.convolution

    def _training_set(self, X: FloatMatrix, Y: Float, weights: Float, layer: Convolution | None = None) -> TrainingSet:
        with blas_threads(len(X)):
            square = float(np.sum(Y**2))
            if Y.any() and not 1e-305 < square < np.inf:
                word = "overflow" if square > 1 else "underflow"
                raise ValueError(f"the squares of y {word}: scale y by a power of ten, and weight_decay with it.")
            return TrainingSet.prepare(
                X, Y, weights,
                loss=self._loss_kind(Y), rank=self.rank, spectral_filter=self._tau,
                standardize=self.standardize,
                merge_features=self.activation == "relu", convolution=layer, fit_intercept=self.fit_intercept,
            )  # fmt: skip

    def _weighed(self, X: FloatMatrix, Y: Float, weights: Float, classes: Any) -> tuple[FloatMatrix, Float, Float]:
        """Rows, encoded targets and weights, the weights times those of the classes if there are any."""
        return X, Y, weights

    @property
    def _classes(self) -> Any:
        """Class labels of a fitted classifier."""
        return getattr(self, "classes_", None)

    def _loss_kind(self, Y: Float) -> LossKind:
        """Loss for encoded targets."""
        raise NotImplementedError

    def _encode_new(self, y: Any) -> tuple[Float, dict[str, Any]]:
        """Targets (n, K) of the loss, and the fitted attributes that describe ``y``."""
        raise NotImplementedError

    def _encode_known(self, y: Any) -> Float:
        raise NotImplementedError

    def _checked_data(self, X: Any, y: Any, sample_weight: Any, *, reset: bool) -> tuple[FloatMatrix, Any, Float]:
        X, numeric = self._as_rows(X, self.convolution if reset else self._layer), self._task == "regression"
        X, y, weights = checked_data(self, X, y, sample_weight, numeric_targets=numeric, reset=reset)
        if not weights.all():  # as if the rows of weight zero were not there
            X, y, weights = X[weights > 0], y[weights > 0], weights[weights > 0]
        return X, y, weights

    def _checked_rows(self, X: Any) -> Float:
        check_is_fitted(self)
        return checked_rows(self, self._as_rows(X, self._layer))

    @staticmethod
    def _as_rows(X: Any, layer: Convolution | None) -> Any:
        """Finite rows of images of several axes; other data as they are."""
        if layer is None:
            return X
        refuse_containers("X", X)
        check_finite("X", X)
        return layer.for_inputs(X).rows(X)

    @property
    def _n_features_out(self) -> int:
        regions = 1 if self.convolution is None else self.network_.convolution.pool.n_regions
        return int(self.network_.n_neurons) * regions


def own_random_state(random_state: Any) -> np.random.RandomState:
    """Random state by scikit-learn's convention, but None is a fresh source: numpy's global one is left alone."""
    return np.random.RandomState() if random_state is None else check_random_state(random_state)
