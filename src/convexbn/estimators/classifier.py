"""ConvexBNClassifier: classification by the programs."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets

from convexbn._types import Float
from convexbn.estimators.base import BaseConvexBN
from convexbn.estimators.parameters import parameters
from convexbn.program.losses import LOSSES, LossKind, class_loss, softmax
from convexbn.program.targets import class_targets


@parameters
class ConvexBNClassifier(ClassifierMixin, BaseConvexBN):
    """Batch-normalised two-layer network trained to a certified optimum, for classification.

    Two classes are one output with targets -1 and +1; more are one-hot, for the squared hinge -1 and +1.

    Parameters
    ----------
    activation : {"gated", "relu"}, default="gated"
        ``"gated"``: fixed gates are part of the model, and the optimum for those gates is certified. ``"relu"``: all
        patterns and widths, by formula if the distinct rows are affinely independent (rank n - 1). Else training
        searches for neurons, and the certificate bounds what the search did not see.
    loss : {"squared", "squared_hinge", "logistic", "cross_entropy"}, default="squared"
        ``"squared"`` is half the sum of squared errors. ``"squared_hinge"`` is ``1/2 sum (1 - y f)_+^2``, for more
        than two classes summed over the outputs, each of which tells one class from all others. ``"cross_entropy"``
        is the softmax cross-entropy (for two classes the logistic loss); ``"logistic"`` is for two classes.
    weight_decay : float or "auto", default="auto"
        Strength beta of the weight decay on batch norm's scale and shift and on the output layer, against the *sum* of
        the losses: ``beta = lam * sqrt(n)`` for a torch optimiser's ``weight_decay`` lam with a mean loss. ``"auto"``
        is 0.02 of :func:`max_weight_decay`.
    n_gates : int, default=100
        Number of gates to draw; of gates with equal training patterns one is kept.
    gates : {"data", "whitened", "trained"} or array (d, n_gates) or (d + 1, n_gates), default="data"
        Gates ``1[(x - mean)'g + b >= 0]``: normal on the raw features without offset, isotropic on the whitened data,
        the first layers of ReLU neurons after a short mini-batch descent, or given (offsets in the last row).
    width : int or None, default=None
        Neurons that ReLU training starts with: None for 200, or for 1000 if the whitened rows have more than a million
        entries. Then mini-batch descent trains them, and ``max_iter`` is the number of epochs (20).
    n_starts : int, default=1
        Mini-batch descents, each of ``width`` neurons from a random start, whose mean is the network: the program is
        convex, so its objective is at most the mean of theirs. Two take twice the time.
    rank : int, float in (0, 1] or None, default=None
        Directions of the centred, unscaled data to keep: the top ``rank``, the fewest with this share of the variance,
        or all.
    spectral_filter : float or None, default=None
        ``tau / s_1 > 0``: shrinks the singular directions of the same data by ``phi_i = s_i / sqrt(s_i^2 + tau^2)``, a
        smooth form of ``rank``; .1 is a good first value. The first layer's weight decay is then that of
        ``sqrt(gamma^2 (1 + tau^2 ||w||^2 / n) + shift^2)`` for a neuron ``w`` of unit variance, and the certificate is
        for this program.
    convolution : Convolution or None, default=None
        Makes the first layer a convolution with batch norm over all locations and pooling, see
        :class:`convexbn.Convolution`. ``X`` holds images ``(n, height, width, channels)``, or their flattened rows;
        ``rank``, ``spectral_filter`` and gates are then those of the patches.
    solver : {"auto", "group_newton", "subspace", "proximal", "conic"}, default="auto"
        ``"group_newton"``: squared loss, up to thousands of rows. ``"subspace"``: any loss, many rows; with a
        ``time_limit`` a good network long before its certificate. ``"proximal"``: any loss, a simple method.
        ``"conic"``: Clarabel, the reference (extra ``reference``). For gated networks; ReLU has its own.
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
    history_ : list of Progress
        Objective and lower bound after each iteration, as the solver computed them. The search for ReLU networks
        has crude bounds, and an ``estimated_bound`` that proves nothing.
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

    _task: ClassVar[str] = "classification"

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
        of the outputs (for two classes the sigmoid of twice the output): monotone in the outputs, not calibrated.
        """
        outputs = self.decision_function(X)
        if outputs.ndim == 1:
            logits = outputs if LOSSES[self.loss].models_probabilities else 2 * outputs
            outputs = np.column_stack([np.zeros_like(logits), logits])
        with np.errstate(all="ignore"):
            return softmax(outputs)

    def _loss_kind(self, Y: Float) -> LossKind:
        return class_loss(self.loss, Y.shape[1])

    def _encode_new(self, y: Any) -> tuple[Float, dict[str, Any]]:
        check_classification_targets(y)
        classes = np.unique(y)
        if len(classes) < 2:
            raise ValueError(f"The classifier needs at least 2 classes; all rows are of class {classes.tolist()[0]!r}.")
        if len(classes) > 2 and not LOSSES[self.loss].takes_outputs(len(classes)):
            raise ValueError(f"loss={self.loss!r} is for two classes, not {len(classes)}: use loss='cross_entropy'.")
        return self._encode(y, classes), {"classes_": classes}

    def _encode_known(self, y: Any) -> Float:
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"class {unknown[0]} was not seen in training; known are {self.classes_.tolist()}.")
        return self._encode(y, self.classes_)

    def _encode(self, y: np.ndarray, classes: np.ndarray) -> Float:
        n_outputs = 1 if len(classes) == 2 else len(classes)
        return class_targets(np.searchsorted(classes, y), n_outputs, self.loss)
