"""ConvexBNClassifier: classification by the programs."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets

from convexbn._types import Float, FloatMatrix
from convexbn.data.canonical import canonical_rows
from convexbn.estimators.base import BaseConvexBN
from convexbn.estimators.class_weight import class_weighted
from convexbn.estimators.parameters import ClassificationParameters, parameters, trained_loss
from convexbn.estimators.plain_values import ScoreOfPlainTargets
from convexbn.program.losses import LOSSES, LossKind, class_loss, softmax
from convexbn.program.targets import class_targets


@parameters
class ConvexBNClassifier(ScoreOfPlainTargets, ClassifierMixin, ClassificationParameters, BaseConvexBN):
    """Batch-normalised two-layer network trained to a certified optimum, for classification.

    Two classes are one output with targets -1 and +1; more are one-hot, for the squared hinge -1 and +1.

    The default, ``activation="gated"``, is piecewise linear and *jumps* at its gates, fixed half-spaces: fast to train
    and certified to rounding on data of any size, but not continuous. ``activation="relu"`` is the ReLU network of the
    paper, continuous; it takes longer to train, and away from small or low-rank data the proof leaves a gap. Choose it
    where close rows must get close outputs, such as for derivatives, or where a plain ReLU network is asked for.

    Parameters
    ----------
    activation : {"gated", "relu"}, default="gated"
        ``"gated"``: fixed gates are part of the model, and the optimum for those gates is certified. ``"relu"``: all
        patterns and widths, by formula if the distinct rows are affinely independent (rank n - 1). Else training
        searches for neurons, and the certificate bounds what the search did not see.
    loss : {"auto", "squared", "squared_hinge", "logistic", "cross_entropy"}, default="auto"
        ``"cross_entropy"`` is the softmax cross-entropy (for two classes the logistic loss); ``"logistic"`` is for two
        classes. ``"squared"`` is half the sum of squared errors, which is trained several times as fast.
        ``"squared_hinge"`` is ``1/2 sum (1 - y f)_+^2``, for more than two classes summed over the outputs, each of
        which tells one class from all others. ``"auto"`` is the cross-entropy for at most 60 columns, the squared loss
        for more, where it is about as accurate and faster (docs/tables.md), and for convolutions; ``loss_`` names it.
    weight_decay : float or "auto", default="auto"
        Strength beta of the weight decay on batch norm's scale and shift and on the output layer, against the *sum* of
        the losses: ``beta = lam * sqrt(n)`` for a torch optimiser's ``weight_decay`` lam with a mean loss. ``"auto"``
        is the one of least loss on held-out rows, among halvings of :func:`max_weight_decay`: five folds up to 500
        rows, then fewer, and at most 1,500 rows to train on and 1,000 held out; for ReLU networks that of a gated one,
        and with max pooling .02 of the largest.
    n_gates : int, default=100
        Number of gates to draw; of gates with equal training patterns one is kept. ReLU networks have none.
    gates : {"data", "whitened", "trained"} or array (d, n_gates) or (d + 1, n_gates), default="trained"
        Gates ``1[(x - mean)'g + b >= 0]``: normal on the raw features without offset, isotropic on the whitened data,
        the first layers of ReLU neurons after a short mini-batch descent, or given (offsets in the last row). For gated
        networks; with ``activation="relu"`` a value other than the default is a warning.
    linear : bool, default=True
        Whether one more gate is always open: the network then contains a linear model.
    fit_intercept : bool, default=True
        Whether the outputs have a bias, which the weight decay leaves alone. False is the paper's program.
    standardize : bool, default=True
        Whether ``rank`` and ``spectral_filter`` refer to columns divided by their deviations, so that units do not
        matter. False: columns in their own units, as gradient descent sees them.
    width : int or None, default=None
        Neurons that ReLU training starts with: None for 200. If the whitened rows have more than a million entries,
        None is for twice the inputs, from 100 to 1000, and for 1000 with a convolution; then mini-batch descent trains
        them, and ``max_iter`` is the number of epochs (20). Set for a gated network it is a warning, as is
        ``n_starts``.
    n_starts : int, default=1
        Mini-batch descents, each of ``width`` neurons from a random start, whose mean is the network: the program is
        convex, so its objective is at most the mean of theirs. Two take twice the time.
    rank : int, float in (0, 1] or None, default=None
        Directions of the centred data to keep: the top ``rank``, the fewest with this share of the variance, or all.
    spectral_filter : float, "auto" or None, default="auto"
        ``tau / s_1 > 0``: shrinks the singular directions of the same data by ``phi_i = s_i / sqrt(s_i^2 + tau^2)``, a
        smooth form of ``rank``. ``"auto"`` is .3 for gated networks on rows, and None for others. The first layer's
        weight decay is then that of ``sqrt(gamma^2 (1 + tau^2 ||w||^2 / n) + shift^2)`` for a neuron ``w`` of unit
        variance, and the certificate is for this program.
    convolution : Convolution or None, default=None
        Makes the first layer a convolution with batch norm over all locations and pooling, see
        :class:`convexbn.Convolution`. ``X`` holds images ``(n, height, width, channels)``, or their flattened rows;
        ``rank``, ``spectral_filter`` and gates are then those of the patches.
    solver : {"auto", "group_newton", "subspace", "proximal", "conic"}, default="auto"
        ``"group_newton"``: squared loss, up to thousands of rows. ``"subspace"``: any loss, many rows; with a
        ``time_limit`` a good network long before its certificate. ``"proximal"``: any loss, a simple method.
        ``"conic"``: Clarabel, the reference (extra ``reference``). For gated networks; ReLU has its own, and
        with it a value other than the default is a warning.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes, by which those of their rows are multiplied: ``{label: weight}``, 1 for classes that are
        not named, or ``"balanced"``: the same total for each class, ``total / (n_classes * total of the class)``.
    tol : float, default=1e-6
        Relative duality gap that counts as optimal.
    max_iter : int or None, default=None
        Limit of the solver's iterations; None for the solver's own.
    time_limit : float or None, default=None
        Seconds for the whole fit, by the clock: whitening (which cannot be cut short), gates, solver and proof. With
        ``activation="relu"`` the solver takes at most half of them, the proof the rest. The certificate says so when
        the network is unfinished. None: a stated amount of work.
    proof_time : float or None, default=None
        Seconds for the bounds over all patterns, with ``activation="relu"``. None: the rest of a ``time_limit``, or
        else as long as the solver took and a second. The network does not depend on it. The certificate says what more
        would buy; ``certify(X, y, time_limit=...)`` takes it later.
    random_state : int, RandomState or None, default=None
        For the gates, or the starting neurons.
    callback : callable or None, default=None
        Called after each iteration with a ``Progress`` (iteration, objective, lower_bound, working_set,
        estimated_bound, relative_gap, estimated_gap); a true return value stops the solver with status INTERRUPTED.

    Attributes
    ----------
    certificate_ : Certificate
        Objective, lower bound, gap, status and a sentence; computed by code that does not know the solver.
    network_ : BatchNormNetwork
        The network as ordinary weights.
    gates_, gate_offsets_ : ndarray (d, n_gates), (n_gates,), or None
        All gates of the program.
    weight_decay_, rank_, n_iter_ : float, int, int
        Weight decay used, number of whitened directions, number of iterations.
    feature_importances_ : ndarray (d,)
        Shares of the features in the outputs, whatever their units; not for convolutions.
    history_ : list of Progress
        Objective and lower bound after each iteration, as the solver computed them. The search for ReLU networks
        has crude bounds, and an ``estimated_bound`` that proves nothing.
    loss_ : str
        Name of the loss that was trained.
    fingerprint_ : str
        Hash of the training rows in canonical order.
    temperature_ : float or None
        Divisor of the outputs in ``predict_proba``, calibrated on held-out rows (which trained gates have seen); None
        if there were none.
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

    def decision_function(self, X: Any) -> Float:
        """Raw outputs of the network: (n,) for two classes, else (n, n_classes)."""
        outputs = self._outputs(X, self.__dict__)
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    def predict(self, X: Any) -> np.ndarray:
        """Class of the largest output."""
        fitted = self.__dict__
        outputs = self._outputs(X, fitted)
        labels = (outputs[:, 0] > 0).astype(int) if outputs.shape[1] == 1 else outputs.argmax(axis=1)
        return fitted["classes_"][labels]

    def predict_proba(self, X: Any) -> Float:
        """Class probabilities (n, n_classes).

        Logistic and cross-entropy losses model them. For the squared loss and the squared hinge they are the softmax
        of the outputs over ``temperature_``, which held-out rows calibrate if ``weight_decay="auto"``. For a given
        weight decay they are not calibrated: the temperature is then 1, and 1/2 for two classes.
        """
        fitted = self.__dict__
        outputs, temperature = self._outputs(X, fitted), _temperature(fitted)
        with np.errstate(all="ignore"):
            logits = outputs / temperature
            return softmax(np.hstack([np.zeros_like(logits), logits]) if outputs.shape[1] == 1 else logits)

    @property
    def _temperature(self) -> float:
        """Divisor of the outputs in the softmax or sigmoid."""
        return _temperature(self.__dict__)

    def _loss_kind(self, Y: Float) -> LossKind:
        return class_loss(self.loss_, Y.shape[1])

    def _encode_new(self, y: Any) -> tuple[Float, dict[str, Any]]:
        check_classification_targets(y)
        classes = np.unique(y)
        if len(classes) < 2:
            raise ValueError(f"The classifier needs at least 2 classes; all rows are of class {classes.tolist()[0]!r}.")
        if len(classes) > 2 and not LOSSES[self.loss_].takes_outputs(len(classes)):
            raise ValueError(f"loss={self.loss!r} is for two classes, not {len(classes)}: use loss='cross_entropy'.")
        return self._encode(y, classes), {"classes_": classes}

    def _weighed(
        self, X: FloatMatrix, Y: Float, weights: Float, classes: np.ndarray
    ) -> tuple[FloatMatrix, Float, Float]:
        if self.class_weight is None:
            return X, Y, weights
        X, Y, weights = canonical_rows(X, Y, weights)  # before products are rounded: repetition stays equal to weights
        labels = Y[:, 0] > 0 if Y.shape[1] == 1 else Y.argmax(axis=1)
        return X, Y, class_weighted(weights, labels.astype(np.intp), classes, self.class_weight)

    def _encode_known(self, y: Any) -> Float:
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"class {unknown[0]} was not seen in training; known are {self.classes_.tolist()}.")
        return self._encode(y, self.classes_)

    def _encode(self, y: np.ndarray, classes: np.ndarray) -> Float:
        n_outputs = 1 if len(classes) == 2 else len(classes)
        return class_targets(np.searchsorted(classes, y), n_outputs, self.loss_)


def _temperature(fitted: dict[str, Any]) -> float:
    """Divisor of the outputs of one fit in the softmax or sigmoid."""
    if (calibrated := fitted.get("temperature_")) is not None:
        return float(calibrated)
    return 0.5 if len(fitted["classes_"]) == 2 and not LOSSES[trained_loss(fitted)].models_probabilities else 1.0
