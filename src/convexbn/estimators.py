"""ConvexBNClassifier and ConvexBNRegressor: the programs behind scikit-learn's interface."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    RegressorMixin,
    TransformerMixin,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from convexbn._threads import solving
from convexbn._types import Float, FloatMatrix
from convexbn.certificate.certificate import Certificate
from convexbn.certificate.status import Status
from convexbn.data.canonical import canonical_rows, fingerprint
from convexbn.data.convolution import Convolution
from convexbn.program.gated import GatedProgram
from convexbn.program.losses import LOSSES, LossKind, loss_kind, softmax
from convexbn.solvers.base import Budget, Progress
from convexbn.training.fit import SOLVERS, Fit, certify, fit_gated, fit_relu
from convexbn.training.training_set import AUTO_FRACTION, TrainingSet
from convexbn.validation import check_finite, checked_data, checked_rows, refuse_containers

if TYPE_CHECKING:
    from convexbn.training.relu_conversion import Conversion


class _ConvexBN(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What both estimators share: parameters, fit, hidden activations, persistence."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "activation": [StrOptions({"gated", "relu"})],
        "weight_decay": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "n_gates": [Interval(Integral, 1, None, closed="left")],
        "width": [Interval(Integral, 1, None, closed="left"), None],
        "n_starts": [Interval(Integral, 1, None, closed="left")],
        "gates": [StrOptions({"data", "whitened", "trained"}), "array-like"],
        "rank": [Interval(Integral, 1, None, closed="left"), Interval(Real, 0, 1, closed="right"), None],
        "spectral_filter": [Interval(Real, 0, None, closed="neither"), None],
        "convolution": [Convolution, None],
        "solver": [StrOptions({"auto", *SOLVERS})],
        "tol": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left"), None],
        "time_limit": [Interval(Real, 0, None, closed="left"), None],
        "random_state": ["random_state"],
        "callback": [callable, None],
    }

    def __init__(
        self,
        *,
        activation: str = "gated",
        loss: str = "squared",
        weight_decay: float | str = "auto",
        n_gates: int = 100,
        gates: str | FloatMatrix = "data",
        width: int | None = None,
        n_starts: int = 1,
        rank: int | float | None = None,
        spectral_filter: float | None = None,
        convolution: Convolution | None = None,
        solver: str = "auto",
        tol: float = 1e-6,
        max_iter: int | None = None,
        time_limit: float | None = None,
        random_state: Any = None,
        callback: Callable[[Progress], object] | None = None,
    ) -> None:
        self.activation = activation
        self.loss = loss
        self.weight_decay = weight_decay
        self.n_gates = n_gates
        self.gates = gates
        self.width = width
        self.n_starts = n_starts
        self.rank = rank
        self.spectral_filter = spectral_filter
        self.convolution = convolution
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.time_limit = time_limit
        self.random_state = random_state
        self.callback = callback

    def transform(self, X: Any) -> Float:
        """Hidden activations, one a neuron, of a convolution one a region and neuron: (n, d) -> (n, n_neurons)."""
        rows = self._checked_rows(X)
        with np.errstate(all="ignore"):
            hidden: Float = self.network_.hidden(rows)
        return hidden

    def _outputs(self, X: Any, fitted: dict[str, Any]) -> Float:
        """Outputs of one fit, whose attributes a fit in another thread replaces all at once."""
        rows = self._checked_rows(X)
        with np.errstate(all="ignore"):
            outputs: Float = fitted["network_"].predict(rows)
        return outputs

    def certify(self, X: Any, y: Any, sample_weight: Any = None) -> Certificate:
        """Judge the stored network on rows: those it was trained on, or others.

        Only the question is taken from the model (gates, loss, weight decay, rank, spectral filter); statistics,
        objective and bound are recomputed from the rows given. ReLU networks are judged over all patterns,
        by bounds that are tried for ``time_limit`` seconds, or for their stated work without one.
        """
        check_is_fitted(self)
        X, y, weights, input_eps = self._checked_data(X, y, sample_weight, reset=False)
        with solving(len(X)):
            data = self._training_set(X, self._encode_known(y), weights, input_eps, self._layer)
            program = None if self.gates_ is None else data.gated_program(self.gates_, self.gate_offsets_)
            return certify(
                data, self.network_, self.weight_decay_, program,
                tol=self.tol, stopped_by="tolerance", own_rows=data.fingerprint == self.fingerprint_,
                deadline=Budget(self.time_limit).deadline,
            )  # fmt: skip

    def to_relu(self, X: Any, y: Any, sample_weight: Any = None, *, unrealisable: str = "refuse") -> Conversion:
        """The gated network as a plain ReLU network with the same outputs on its training rows.

        Each linear neuron of a gate becomes the difference of two ReLU neurons of its cone, of smallest norms. The
        outputs are kept and the gates dropped: the objective, which is returned before and after, rises, often many
        times over. To train a good ReLU network use ``activation="relu"``.

        Parameters
        ----------
        X, y, sample_weight
            The rows that the model was trained on.
        unrealisable : {"refuse", "nearest"}, default="refuse"
            With ``rank`` gates may cut the rows in ways that no direction of the whitened data does: an error with
            their number, or the program solved again with the nearest gates that are realised.

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

        check_is_fitted(self)
        if self.convolution is not None:
            raise ValueError("to_relu is for dense data: train a convolutional ReLU network with activation='relu'.")
        X, y, weights, input_eps = self._checked_data(X, y, sample_weight, reset=False)
        with solving(len(X)):
            data = self._training_set(X, self._encode_known(y), weights, input_eps, self._layer)
            if data.fingerprint != self.fingerprint_:
                raise ValueError("to_relu needs the rows that the model was trained on, and these are others.")
            return to_relu(
                data, self.network_, self.gates_, self.gate_offsets_, self.weight_decay_,
                tol=self.tol, unrealisable=unrealisable,
            )  # fmt: skip

    def fingerprint(self, X: Any, y: Any, sample_weight: Any = None) -> str:
        """Hash of rows as ``fit`` stores it in ``fingerprint_``; independent of their order and repetition."""
        check_is_fitted(self)
        X, y, weights, _ = self._checked_data(X, y, sample_weight, reset=False)
        return fingerprint(*canonical_rows(X, self._encode_known(y), weights))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a safetensors file, atomically; ``convexbn.load`` reads it."""
        from convexbn import storage

        storage.save(self, path)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Check the parameters; restore every attribute when the fit inside fails, whatever the reason."""
        self._validate_params()
        before = self.__dict__.copy()
        try:
            yield
        except BaseException:
            self.__dict__ = before
            raise

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> Self:
        """Train; every fitted attribute is assigned at once when everything has succeeded."""
        with self._all_or_nothing():
            budget = Budget(self.time_limit, self.callback)
            data, labels = self._prepared(X, y, sample_weight)
            self.__dict__ = self.__dict__ | self._solved(data, budget) | labels
            _warn_unless_proved(self.certificate_)
        return self

    def _prepared(self, X: Any, y: Any, sample_weight: Any) -> tuple[TrainingSet, dict[str, Any]]:
        """Training set of the rows, checked; and the fitted attributes that tell of ``y``."""
        refuse_containers("X", X)
        layer = None if self.convolution is None else self.convolution.for_inputs(X)
        X, y, weights, input_eps = self._checked_data(X, y, sample_weight, reset=True)
        Y, labels = self._encode_new(y)
        with solving(len(X)):
            return self._training_set(X, Y, weights, input_eps, layer), labels

    def _solved(
        self,
        data: TrainingSet,
        budget: Budget,
        start: Any = None,
        drawn: tuple[Float, Float, GatedProgram] | None = None,
    ) -> dict[str, Any]:
        """Fitted attributes on a training set; from a ``Solution`` of the gated program or ``Neurons`` if given.

        ``drawn`` are the gates, where they are known already.
        """
        random_state = _own_random_state(self.random_state)
        with solving(len(data.X)):
            if self.activation == "relu":
                weight_decay = self._resolved(lambda: data.max_weight_decay_relu(proved=False)[0])
                fit = fit_relu(
                    data, weight_decay,
                    tol=self.tol, max_iter=self.max_iter, width=self.width, n_starts=self.n_starts, budget=budget,
                    random_state=random_state, start=start,
                )  # fmt: skip
                return {"gates_": None, "gate_offsets_": None} | self._fitted(data, weight_decay, fit)
            gates, offsets, program = drawn or data.draw_gates(self.gates, self.n_gates, random_state)
            weight_decay = self._resolved(program.max_weight_decay)
            fit = fit_gated(
                data, program.with_weight_decay(weight_decay), gates, offsets,
                solver=self.solver, tol=self.tol, max_iter=self.max_iter, budget=budget, start=start,
            )  # fmt: skip
            return {"gates_": gates, "gate_offsets_": offsets} | self._fitted(data, weight_decay, fit)

    def _max_weight_decay(self, data: TrainingSet, *, proved: bool) -> float | tuple[float, float]:
        """Of a gated network a number; of a ReLU network the value of a search and an upper bound, if to be proved."""
        with solving(len(data.X)):
            if self.activation == "relu":
                return data.max_weight_decay_relu(proved=proved)
            return self._drawn(data)[2].max_weight_decay()

    def _drawn(self, data: TrainingSet) -> tuple[Float, Float, GatedProgram]:
        """Gates, their offsets and program, the same each time where ``random_state`` is an integer."""
        with solving(len(data.X)):
            return data.draw_gates(self.gates, self.n_gates, _own_random_state(self.random_state))

    def _resolved(self, largest: Callable[[], float]) -> float:
        """The weight decay; ``"auto"`` is ``AUTO_FRACTION`` of the largest useful one."""
        if not isinstance(self.weight_decay, str):
            return float(self.weight_decay)
        return AUTO_FRACTION * peak if (peak := largest()) > 0 else 1.0

    def _fitted(self, data: TrainingSet, weight_decay: float, fit: Fit) -> dict[str, Any]:
        return {
            "network_": fit.network,
            "certificate_": fit.certificate,
            "history_": fit.history,
            "n_iter_": fit.n_iter,
            "weight_decay_": weight_decay,
            "rank_": data.whitening.rank,
            "fingerprint_": data.fingerprint,
        }

    @property
    def _layer(self) -> Convolution | None:
        """The convolution with the shape of the inputs of the fit; before it, as it was given."""
        if self.convolution is None or not hasattr(self, "network_"):
            return self.convolution
        layer: Convolution = self.network_.convolution
        return layer

    def _training_set(
        self, X: FloatMatrix, Y: Float, weights: Float, input_eps: float, layer: Convolution | None = None
    ) -> TrainingSet:
        with np.errstate(all="ignore"):
            square = float(np.sum(Y**2))
        if Y.any() and not 1e-305 < square < np.inf:
            word = "overflow" if square > 1 else "underflow"
            raise ValueError(f"the squares of y {word}: scale y by a power of ten, and weight_decay with it.")
        return TrainingSet.prepare(
            X, Y, weights,
            loss=self._loss_kind(Y), rank=self.rank, spectral_filter=self.spectral_filter, input_eps=input_eps,
            merge_features=self.activation == "relu", convolution=layer,
        )  # fmt: skip

    def _loss_kind(self, Y: Float) -> LossKind:
        """The loss for encoded targets."""
        return LOSSES[self.loss]

    def _encode_new(self, y: Any) -> tuple[Float, dict[str, Any]]:
        """Targets to be learned, and the fitted attributes that tell of ``y``."""
        raise NotImplementedError

    def _encode_known(self, y: Any) -> Float:
        raise NotImplementedError

    def _checked_data(
        self, X: Any, y: Any, sample_weight: Any, *, reset: bool
    ) -> tuple[FloatMatrix, Any, Float, float]:
        numeric = isinstance(self, RegressorMixin)
        X = self._as_rows(X, self.convolution if reset else self._layer)
        X, y, weights, input_eps = checked_data(self, X, y, sample_weight, numeric_targets=numeric, reset=reset)
        if not weights.all():  # as if the rows of weight zero were not there
            X, y, weights = X[weights > 0], y[weights > 0], weights[weights > 0]
        return X, y, weights, input_eps

    def _checked_rows(self, X: Any) -> Float:
        check_is_fitted(self)
        return checked_rows(self, self._as_rows(X, self._layer))

    @staticmethod
    def _as_rows(X: Any, layer: Convolution | None) -> Any:
        """Images of several axes as finite rows."""
        if layer is None:
            return X
        refuse_containers("X", X)
        check_finite("X", X)
        return layer.for_inputs(X).rows(X)

    @property
    def _n_features_out(self) -> int:
        regions = 1 if self.convolution is None else self.network_.convolution.pool.n_regions
        return int(self.network_.n_neurons) * regions


class ConvexBNClassifier(ClassifierMixin, _ConvexBN):
    """Batch-normalised two-layer network trained to a certified optimum, for classification.

    Two classes are one output with targets -1 and +1; more are one-hot, for the squared hinge -1 and +1.

    Parameters
    ----------
    activation : {"gated", "relu"}, default="gated"
        ``"gated"``: fixed gates are part of the model, and the optimum for those gates is certified.
        ``"relu"``: all patterns and widths. By formula where the distinct rows are affinely independent
        (rank n - 1); elsewhere neurons are searched for, and the certificate bounds what the search did not see.
    loss : {"squared", "squared_hinge", "logistic", "cross_entropy"}, default="squared"
        ``"squared"`` is half the sum of squared errors. ``"squared_hinge"`` is ``1/2 sum (1 - y f)_+^2``, for more
        than two classes summed over the outputs, each of which tells one class from all others. ``"cross_entropy"``
        is the softmax cross-entropy (for two classes the logistic loss); ``"logistic"`` is for two classes.
    weight_decay : float or "auto", default="auto"
        Strength beta of the weight decay on batch norm's scale and shift and on the output layer, against the
        *sum* of the losses. A torch optimiser's ``weight_decay`` lam with a mean loss is
        ``beta = lam * sqrt(n)``. ``"auto"`` is 0.02 of :func:`max_weight_decay`.
    n_gates : int, default=100
        Number of gates that are drawn; equal training patterns are kept once.
    gates : {"data", "whitened", "trained"} or array (d, n_gates) or (d + 1, n_gates), default="data"
        Gates ``1[(x - mean)'g + b >= 0]``: normal on the raw features without offset, isotropic on the
        whitened data, the first layers of ReLU neurons after a short mini-batch descent, or given (offsets in the last
        row).
    width : int or None, default=None
        Neurons that ReLU training starts with: None for 200, and 1000 where the whitened rows have more than a million
        entries. There mini-batch descent trains them, and ``max_iter`` is the number of epochs (20).
    n_starts : int, default=1
        Mini-batch descents, each of ``width`` neurons from a random start, whose mean is the network: the program is
        convex, so its objective is at most the mean of theirs. Two take twice the time.
    rank : int, float in (0, 1] or None, default=None
        Keep all directions, the top ``rank``, or the fewest with this share of the variance, of the centred,
        unscaled data.
    spectral_filter : float or None, default=None
        ``tau / s_1 > 0``: singular directions of the same data are shrunk by ``phi_i = s_i / sqrt(s_i^2 + tau^2)``, a
        smooth form of ``rank``; .1 is a good first value. The first layer's weight decay is then that of
        ``sqrt(gamma^2 (1 + tau^2 ||w||^2 / n) + shift^2)`` for a neuron ``w`` of unit variance, and the certificate is
        for this program.
    convolution : Convolution or None, default=None
        The first layer as a convolution with batch norm over all locations and pooling, see
        :class:`convexbn.Convolution`. ``X`` holds images ``(n, height, width, channels)``, or their flattened rows;
        ``rank``, ``spectral_filter`` and gates are then those of the patches.
    solver : {"auto", "group_newton", "subspace", "proximal", "conic"}, default="auto"
        ``"group_newton"``: squared loss, up to thousands of rows. ``"subspace"``: any loss, many rows; with a
        ``time_limit`` a good network long before its certificate. ``"proximal"``: any loss, a simple method.
        ``"conic"``: Clarabel, the reference (extra ``reference``). For gated networks; ReLU has its own.
    tol : float, default=1e-6
        Relative duality gap that counts as optimal.
    max_iter : int or None, default=None
        Limit of the solver's iterations; None takes the solver's own.
    time_limit : float or None, default=None
        Seconds for the solver and, with ``activation="relu"``, the proof: at most half of them for the solver.
        None: a stated amount of work.
    random_state : int, RandomState or None, default=None
        For the gates, or the starting neurons.
    callback : callable or None, default=None
        Called after each iteration with a ``Progress`` (iteration, objective, lower_bound, working_set,
        relative_gap); a true return value stops the solver with status INTERRUPTED.

    Attributes
    ----------
    certificate_ : Certificate
        Objective, lower bound, gap, status and a sentence; computed by code that does not know the solver.
    network_ : BatchNormNetwork
        The network as ordinary weights.
    gates_, gate_offsets_ : ndarray (d, n_gates), (n_gates,), or None
        All gates of the program.
    weight_decay_ : float
        The weight decay used.
    rank_ : int
        Number of whitened directions.
    history_ : list of Progress
        Objective and lower bound after each iteration, the solver's own.
    n_iter_ : int
        Iterations done.
    fingerprint_ : str
        Hash of the training rows in canonical order.
    classes_ : ndarray (n_classes,)
        Class labels.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> model = ConvexBNClassifier(random_state=0).fit(X, y)
    >>> model.certificate_.status.value, bool(model.certificate_.relative_gap <= 1e-6)
    ('CERTIFIED', True)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **_ConvexBN._parameter_constraints,
        "loss": [StrOptions({"squared", "squared_hinge", "logistic", "cross_entropy"})],
    }

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train to a certified optimum.

        Parameters
        ----------
        X : array-like (n, d)
            Features.
        y : array-like (n,)
            Class labels.
        sample_weight : array-like (n,), optional
            Equal to repeating rows.
        """
        return self._fit(X, y, sample_weight)

    def decision_function(self, X: Any) -> Float:
        """Raw outputs of the network: (n,) for two classes, else (n, n_classes)."""
        outputs = self._outputs(X, self.__dict__)
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    def predict(self, X: Any) -> np.ndarray:
        """Class of the largest output."""
        fitted = self.__dict__
        outputs = self._outputs(X, fitted)
        labels = (outputs[:, 0] > 0).astype(int) if outputs.shape[1] == 1 else outputs.argmax(axis=1)
        classes: np.ndarray = fitted["classes_"][labels]
        return classes

    def predict_proba(self, X: Any) -> Float:
        """Class probabilities (n, n_classes).

        Logistic and cross-entropy losses model them. For the squared loss and the squared hinge they are the softmax
        of the outputs (for two classes the sigmoid of twice the output): monotone in the outputs, not calibrated.
        """
        outputs = self.decision_function(X)
        if outputs.ndim == 1:
            logits = outputs if self.loss in ("logistic", "cross_entropy") else 2 * outputs
            outputs = np.column_stack([np.zeros_like(logits), logits])
        with np.errstate(all="ignore"):
            return softmax(outputs)

    def _loss_kind(self, Y: Float) -> LossKind:
        return LOSSES["logistic" if self.loss == "cross_entropy" and Y.shape[1] == 1 else self.loss]

    def _encode_new(self, y: Any) -> tuple[Float, dict[str, Any]]:
        check_classification_targets(y)
        classes = np.unique(y)
        if len(classes) < 2:
            raise ValueError(
                f"The classifier needs samples of at least 2 classes; all are of class {classes.tolist()[0]!r}."
            )
        if self.loss == "logistic" and len(classes) > 2:
            raise ValueError(f"loss='logistic' is for two classes, and y has {len(classes)}; use loss='cross_entropy'.")
        return self._encode(y, classes), {"classes_": classes}

    def _encode_known(self, y: Any) -> Float:
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"class {unknown[0]} was not seen in training; known are {self.classes_.tolist()}.")
        return self._encode(y, self.classes_)

    def _encode(self, y: np.ndarray, classes: np.ndarray) -> Float:
        targets = encode_classes(y, classes)
        return 2 * targets - 1 if self.loss == "squared_hinge" and targets.shape[1] > 1 else targets


class ConvexBNRegressor(RegressorMixin, _ConvexBN):
    """Batch-normalised two-layer network trained to a certified optimum, for regression.

    There is no output intercept: the constant is fitted through batch norm's shift, and penalised like
    everything else. Centre y when its mean is large.

    Parameters
    ----------
    activation, weight_decay, n_gates, gates, width, n_starts, rank, spectral_filter, convolution, solver
        As in :class:`ConvexBNClassifier`.
    tol, max_iter, time_limit, random_state, callback
        As in :class:`ConvexBNClassifier`.
    loss : {"squared", "huber"}, default="squared"
        Half the sum of squared errors, or of Huber's: linear beyond ``huber_delta``, so that outliers pull no harder.
    huber_delta : float, default=1.0
        Error from which on ``loss="huber"`` is linear, in the units of y.

    Attributes
    ----------
    certificate_, network_, gates_, gate_offsets_, weight_decay_, rank_, history_, n_iter_, fingerprint_
        As in :class:`ConvexBNClassifier`.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = ConvexBNRegressor(random_state=0, weight_decay=200.0).fit(X, y - y.mean())
    >>> model.certificate_.status.value
    'CERTIFIED'
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **_ConvexBN._parameter_constraints,
        "loss": [StrOptions({"squared", "huber"})],
        "huber_delta": [Interval(Real, 0, None, closed="neither")],
    }

    def __init__(
        self,
        *,
        activation: str = "gated",
        loss: str = "squared",
        huber_delta: float = 1.0,
        weight_decay: float | str = "auto",
        n_gates: int = 100,
        gates: str | FloatMatrix = "data",
        width: int | None = None,
        n_starts: int = 1,
        rank: int | float | None = None,
        spectral_filter: float | None = None,
        convolution: Convolution | None = None,
        solver: str = "auto",
        tol: float = 1e-6,
        max_iter: int | None = None,
        time_limit: float | None = None,
        random_state: Any = None,
        callback: Callable[[Progress], object] | None = None,
    ) -> None:
        super().__init__(
            activation=activation, loss=loss, weight_decay=weight_decay, n_gates=n_gates, gates=gates, width=width,
            n_starts=n_starts, rank=rank, spectral_filter=spectral_filter, convolution=convolution, solver=solver,
            tol=tol, max_iter=max_iter, time_limit=time_limit, random_state=random_state, callback=callback,
        )  # fmt: skip
        self.huber_delta = huber_delta

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train to a certified optimum.

        Parameters
        ----------
        X : array-like (n, d)
            Features.
        y : array-like (n,) or (n, K)
            Targets.
        sample_weight : array-like (n,), optional
            Equal to repeating rows.
        """
        return self._fit(X, y, sample_weight)

    def predict(self, X: Any) -> Float:
        """Outputs of the network: (n,) or (n, K) as the targets were."""
        fitted = self.__dict__
        outputs = self._outputs(X, fitted)
        return outputs[:, 0] if fitted["_single_output"] else outputs

    def _loss_kind(self, Y: Float) -> LossKind:
        return loss_kind(self.loss, huber_delta=self.huber_delta)

    def _encode_new(self, y: Any) -> tuple[Float, dict[str, Any]]:
        return self._encode_known(y), {"_single_output": np.ndim(y) == 1}

    def _encode_known(self, y: Any) -> Float:
        targets = np.asarray(y, dtype=np.float64)
        return targets[:, None] if targets.ndim == 1 else targets

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def max_weight_decay(
    X: Any,
    y: Any,
    *,
    activation: str = "gated",
    loss: str = "squared",
    huber_delta: float = 1.0,
    gates: str | FloatMatrix = "data",
    n_gates: int = 100,
    rank: int | float | None = None,
    spectral_filter: float | None = None,
    convolution: Convolution | None = None,
    sample_weight: Any = None,
    random_state: Any = None,
) -> float | tuple[float, float]:
    """Smallest weight decay at which the zero network is optimal.

    Parameters
    ----------
    X : array-like (n, d), or images of several axes with a convolution
        Features.
    y : array-like (n,) or (n, K)
        Integers, booleans and strings are class labels, encoded as ``ConvexBNClassifier`` does; floats
        and matrices are targets.
    activation, loss, huber_delta, gates, n_gates, rank, spectral_filter, convolution, sample_weight, random_state
        As in the estimators.

    Returns
    -------
    float
        Gated: ``max_i ||A' D_i V0||_F`` with ``V0 = -grad L(0)``, exact.
    (float, float)
        ReLU: value of a local search for ``max over ||u|| <= 1 of ||V0'(A u)_+||``, and a valid upper bound. Equal
        where it has a formula (rank n - 1: the largest norm of a ray of ``V0``).

    Examples
    --------
    >>> import numpy as np
    >>> value, upper = max_weight_decay(np.eye(5), [0, 0, 0, 1, 2], activation="relu")
    >>> round(value, 6), round(upper, 6)
    (1.732051, 1.732051)
    """
    is_class = np.asarray(y).ndim == 1 and np.asarray(y).dtype.kind != "f"
    model = ConvexBNClassifier() if is_class else ConvexBNRegressor(huber_delta=huber_delta)
    model.set_params(
        activation=activation, loss=loss, gates=gates, n_gates=n_gates, rank=rank, spectral_filter=spectral_filter,
        convolution=convolution, random_state=random_state,
    )  # fmt: skip
    model._validate_params()
    data, _ = model._prepared(X, y, sample_weight)
    return model._max_weight_decay(data, proved=True)


def encode_classes(y: np.ndarray, classes: np.ndarray) -> Float:
    """-1 and +1 for two classes (n, 1); one-hot for more (n, K)."""
    labels = np.searchsorted(classes, y)
    if len(classes) == 2:
        return np.where(labels == 1, 1.0, -1.0)[:, None]
    one_hot: Float = np.eye(len(classes))[labels]
    return one_hot


def _own_random_state(random_state: Any) -> np.random.RandomState:
    """scikit-learn's convention, except that None is a fresh source: numpy's global one is left alone."""
    return np.random.RandomState() if random_state is None else check_random_state(random_state)


def _warn_unless_proved(proof: Certificate) -> None:
    if proof.status not in (Status.CERTIFIED, Status.TRIVIAL):
        warnings.warn(f"{proof.status.value}: {proof.sentence}", ConvergenceWarning, stacklevel=4)
