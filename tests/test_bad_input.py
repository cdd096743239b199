"""Input values, containers, degenerate data and parameters: reliability.md 4.1, 4.2 and 4.3 (34 to 39)."""

import contextlib
import decimal
import tracemalloc
import warnings

import numpy as np
import pandas as pd
import polars
import pytest
import scipy.sparse
import torch
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from sklearn.utils import get_tags

from convexbn import ConvexBNClassifier, ConvexBNRegressor, Status, max_weight_decay
from instances import PAPER

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 4))
Y = X[:, 0] ** 2 + np.sin(X[:, 1]) - 1
LABELS = (X[:, 0] * X[:, 1] > 0).astype(int)
THREE = np.arange(60) % 3
PROVED = (Status.CERTIFIED, Status.TRIVIAL)
TINY = np.nextafter(0, 1)


def with_defaults(changes):
    """Gates and directions that do not depend on which columns there are."""
    gates = {} if changes.get("activation") == "relu" else {"gates": "data"}
    return {"n_gates": 20, "random_state": 0, "spectral_filter": None, **gates, **changes}


def classifier(**changes):
    return ConvexBNClassifier(**with_defaults(changes))


def regressor(**changes):
    return ConvexBNRegressor(**with_defaults(changes))


def spoiled(array, place, value):
    copy = np.array(array, dtype=float)
    copy[place] = value
    return copy


def is_honest(model, X, y, weights=None):
    """The status is what the recomputed certificate of the same rows says."""
    proof, again = model.certificate_, model.certify(X, y, weights)
    proved = proof.relative_gap <= proof.tolerance and proof.lower_bound <= proof.objective
    return (proof.status in PROVED) == proved and (again.status in PROVED) == (proof.status in PROVED)


# -- 1, 2: values that are not finite --


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [classifier, regressor])
def test_a_value_in_X_that_is_not_finite_is_named_with_its_place(make, value):
    cause = "NaN" if np.isnan(value) else "infinity"
    with pytest.raises(ValueError, match=rf"X contains {cause}.*row 7, column 2"):
        make().fit(spoiled(X, ([7, 9], [2, 0]), value), LABELS)
    model = make().fit(X, LABELS)
    for use in (model.predict, model.transform):
        with pytest.raises(ValueError, match=rf"X contains {cause}.*row 3, column 1"):
            use(spoiled(X, (3, 1), value))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_in_y_that_is_not_finite_is_named_with_its_place(value):
    cause = "missing value" if np.isnan(value) else "y contains infinity"
    with pytest.raises(ValueError, match=rf"{cause}.*row 5"):
        regressor().fit(X, spoiled(Y, [5, 8], value))
    with pytest.raises(ValueError, match=rf"{cause}.*row 5, column 1"):
        regressor().fit(X, spoiled(np.c_[Y, Y], ([5, 8], [1, 0]), value))
    with pytest.raises(ValueError, match=rf"{cause}.*row 5"):
        classifier().fit(X, spoiled(LABELS, 5, value))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named_with_its_place(value):
    cause = "NaN" if np.isnan(value) else "infinity"
    with pytest.raises(ValueError, match=rf"sample_weight contains {cause}.*row 4"):
        regressor().fit(X, Y, spoiled(np.ones(60), 4, value))


def test_values_that_overflow_on_centring_work():
    huge = 1.5e308 * np.tanh(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = regressor().fit(huge, Y)
        predictions = model.predict(huge)
    np.testing.assert_allclose(predictions, regressor().fit(np.tanh(X), Y).predict(np.tanh(X)), rtol=1e-9, atol=1e-9)


# -- 3 to 6: sizes --


@pytest.mark.parametrize("make", [classifier, regressor])
def test_empty_and_single_rows_are_refused(make):
    with pytest.raises(ValueError, match="0 sample"):
        make().fit(np.empty((0, 4)), np.empty(0))
    with pytest.raises(ValueError, match="0 feature"):
        make().fit(np.empty((60, 0)), LABELS)
    with pytest.raises(ValueError, match="1 sample"):
        make().fit(X[:1], LABELS[:1])
    with pytest.raises(ValueError, match=r"sample|inconsistent"):
        make().fit(X, [])


@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_two_rows_work(activation):
    model = regressor(activation=activation, weight_decay=0.1).fit(X[:2], [1.0, -2.0])
    assert model.certificate_.status is Status.CERTIFIED and model.rank_ == 1
    two = classifier(activation=activation, weight_decay=0.1).fit(X[:2], ["a", "b"])
    assert two.predict(X[:2]).tolist() == ["a", "b"]


@pytest.mark.parametrize("d", [3, 10, 11, 12, 40])
def test_every_shape_works_and_formula_and_solver_agree(d):
    """With the pattern of every sign of y among the gates, the gated optimum is at most that of the formula."""
    rng = np.random.default_rng(d)
    data, y = rng.standard_normal((11, d)), rng.standard_normal(11)
    gated = regressor(weight_decay=0.3).fit(data, y)
    assert gated.certificate_.status is Status.CERTIFIED and gated.rank_ == min(d, 10)
    if d < 10:
        return
    relu = regressor(activation="relu", weight_decay=0.3).fit(data, y)
    network = relu.network_
    weight = network.gamma * network.weight / np.sqrt(11)
    gates = np.vstack([weight, network.shift / np.sqrt(11)])
    same = regressor(gates=gates, weight_decay=0.3).fit(data, y)
    assert relu.certificate_.status is Status.CERTIFIED
    assert same.certificate_.objective <= relu.certificate_.objective * (1 + 1e-6)


# -- 7 to 15: containers and types --


def containers(tmp_path):
    np.save(tmp_path / "X.npy", X)
    wide = np.zeros((60, 8))
    wide[:, ::2] = X
    yield from (X.tolist(), tuple(map(tuple, X)), np.load(tmp_path / "X.npy", mmap_mode="r"), np.asfortranarray(X))
    yield from (wide[:, ::2], X[::-1][::-1], X[:, ::-1].copy()[:, ::-1], X.astype(">f8"), X.astype(object))
    yield from (torch.tensor(X), np.ma.masked_array(X), [memoryview(row.copy()) for row in X])


def test_every_container_gives_the_same_bits(tmp_path):
    expected = regressor().fit(X, Y).predict(X)
    for rows in containers(tmp_path):
        np.testing.assert_array_equal(regressor().fit(rows, Y).predict(rows), expected)
    for y in (Y.tolist(), tuple(Y), pd.Series(Y), Y[::-1].copy()[::-1], torch.tensor(Y)):
        np.testing.assert_array_equal(regressor().fit(X, y).predict(X), expected)
    np.testing.assert_array_equal(
        regressor().fit(X, range(60)).predict(X), regressor().fit(X, np.arange(60)).predict(X)
    )


def test_a_read_only_map_is_not_written_to(tmp_path):
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    assert regressor().fit(mapped, Y).certificate_.status is Status.CERTIFIED
    np.testing.assert_array_equal(np.load(tmp_path / "X.npy"), X)


@pytest.mark.parametrize("dtype", ["f2", "f4", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "longdouble"])
def test_every_number_type_is_computed_in_float64(dtype):
    values = np.abs(np.round(4 * X)).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = regressor().fit(values, Y)
    assert model.predict(values).dtype == np.float64 and model.network_.weight.dtype == np.float64
    expected = regressor().fit(values.astype(float), Y).predict(values.astype(float))
    np.testing.assert_allclose(model.predict(values), expected, rtol=1e-9, atol=1e-9)


def test_half_precision_overflow_and_bfloat16():
    with np.errstate(over="ignore"):
        overflown = (1e5 * X).astype(np.float16)
    with pytest.raises(ValueError, match="X contains infinity"):
        regressor().fit(overflown, Y)
    with pytest.raises(TypeError, match="BFloat16"):  # which numpy does not have: convert it with .float()
        regressor().fit(torch.tensor(X).bfloat16(), Y)


def test_a_tensor_with_gradients_is_a_type_error():
    with pytest.raises(TypeError, match="detach"):
        regressor().fit(torch.tensor(X, requires_grad=True), Y)


def test_complex_data_are_refused():
    with pytest.raises(ValueError, match="Complex data not supported"):
        regressor().fit(X + 1j, Y)
    with pytest.raises(ValueError, match="Complex data not supported"):
        regressor().fit(X, Y + 1j)


def test_object_columns_convert_or_are_refused():
    numbers = [[decimal.Decimal(repr(float(value))) for value in row] for row in X]
    expected = regressor().fit(X, Y).predict(X)
    np.testing.assert_array_equal(regressor().fit(np.array(numbers, dtype=object), Y).predict(X), expected)
    for wrong in ("a", None, [1, 2], {}):
        mixed = X.astype(object)
        mixed[3, 1] = wrong
        with pytest.raises((ValueError, TypeError)):
            regressor().fit(mixed, Y)


@pytest.mark.parametrize(
    "column",
    [
        np.full(60, "x", dtype=object),
        pd.Categorical(["x", "z"] * 30),
        pd.date_range("2020-01-01", periods=60),
        pd.timedelta_range("1h", periods=60),
    ],
    ids=["text", "category", "datetime", "timedelta"],
)
def test_a_column_that_is_no_number_is_refused_by_name(column):
    frame = pd.DataFrame(X, columns=["first", "second", "third", "fourth"]).assign(second=column)
    with pytest.raises((ValueError, TypeError), match="second"):
        regressor().fit(frame, Y)


@pytest.mark.parametrize("dtype", ["M8[s]", "m8[s]", "U8", "S8"])
def test_arrays_of_dates_and_text_are_refused(dtype):
    wrong = (X * 1e6).astype("i8").astype(dtype)
    with pytest.raises((ValueError, TypeError)):
        regressor().fit(wrong, Y)
    with pytest.raises((ValueError, TypeError)):
        regressor().fit(X, Y).predict(wrong)


@pytest.mark.parametrize("kind", ["csr_array", "csc_array", "coo_array", "csr_matrix", "csc_matrix", "coo_matrix"])
def test_sparse_data_are_refused_with_the_memory_that_dense_would_take(kind):
    sparse = getattr(scipy.sparse, kind)(X)
    with pytest.raises(TypeError, match=r"toarray.*1\.92e\+03 bytes"):
        regressor().fit(sparse, Y)
    with pytest.raises(TypeError, match="toarray"):
        regressor().fit(X, Y).predict(sparse)


@pytest.mark.parametrize("make", [classifier, regressor])
def test_the_sparse_tag_is_off(make):
    assert get_tags(make()).input_tags.sparse is False


def test_masked_values_matrices_and_records_are_refused():
    masked = np.ma.masked_array(X, mask=X > 1)
    model = regressor().fit(X, Y)
    for attempt in (lambda: regressor().fit(masked, Y), lambda: model.predict(masked)):
        with pytest.raises(ValueError, match="mask"):
            attempt()
    with pytest.raises(ValueError, match="mask"):
        regressor().fit(X, np.ma.masked_array(Y, mask=Y > 1))
    with pytest.raises(ValueError, match="mask"):
        regressor().fit(X, Y, np.ma.masked_array(np.ones(60), mask=Y > 1))
    with pytest.raises(TypeError, match=r"np\.matrix"):
        regressor().fit(np.matrix(X), Y)
    with pytest.raises((ValueError, TypeError)):
        regressor().fit(np.rec.fromarrays(X.T), Y)


@pytest.mark.parametrize("frame", [pd.DataFrame, polars.DataFrame], ids=["pandas", "polars"])
def test_frames_are_matched_by_name(frame):
    columns = dict(zip("abcd", X.T, strict=True))
    model = regressor().fit(frame(columns), Y)
    assert model.feature_names_in_.tolist() == list("abcd")
    np.testing.assert_array_equal(model.predict(frame(columns)), regressor().fit(X, Y).predict(X))
    with pytest.raises(ValueError, match="order"):
        model.predict(frame({name: columns[name] for name in "bacd"}))
    with pytest.raises(ValueError, match="e\n"):
        model.predict(frame({name: columns.get(name, X[:, 0]) for name in "abce"}))


def test_nullable_and_mixed_frames():
    frame = pd.DataFrame(X, columns=list("abcd")).astype("Float64")
    np.testing.assert_array_equal(regressor().fit(frame, Y).predict(frame), regressor().fit(X, Y).predict(X))
    with pytest.raises(ValueError, match="row 2, column 1"):
        regressor().fit(frame.mask(np.indices((60, 4)).T.reshape(60, 4, 2)[:, :, 0] < 0).pipe(hole, 2, "b"), Y)
    with pytest.raises(TypeError, match="names"):
        regressor().fit(pd.DataFrame(X, columns=["a", 1, "c", 2.0]), Y)


def hole(frame, row, column):
    frame = frame.copy()
    frame.loc[row, column] = pd.NA
    return frame


# -- 16 to 18: shapes, predict --


@pytest.mark.parametrize("make", [classifier, regressor])
def test_wrong_shapes_are_refused(make):
    for wrong in (X[:, 0], X[None], 3.0):
        with pytest.raises(ValueError, match=r"2D array|dim 3"):
            make().fit(wrong, LABELS)
    for y in (LABELS[:59], np.r_[LABELS, 1]):
        with pytest.raises(ValueError, match="inconsistent"):
            make().fit(X, y)
    with pytest.raises(ValueError, match="sample_weight"):
        make().fit(X, LABELS, np.ones(59))
    with pytest.raises(ValueError):
        make().fit(X, np.zeros((60, 2, 2)))


def test_labels_in_a_column_are_converted_with_a_warning_and_several_are_refused():
    with pytest.warns(DataConversionWarning):
        model = classifier().fit(X, LABELS[:, None])
    np.testing.assert_array_equal(model.predict(X), classifier().fit(X, LABELS).predict(X))
    with pytest.raises(ValueError, match="1d array"):
        classifier().fit(X, np.c_[LABELS, LABELS])


@pytest.mark.parametrize("make", [classifier, regressor])
def test_predict_names_both_counts_and_needs_a_fit(make):
    with pytest.raises(NotFittedError):
        make().predict(X)
    model = make().fit(X, LABELS)
    with pytest.raises(ValueError, match=r"3 features.*expecting 4"):
        model.predict(X[:, :3])
    with pytest.raises(ValueError, match="0 sample"):
        model.predict(X[:0])


def test_a_million_rows_are_predicted_in_bounded_memory():
    model = regressor(n_gates=100).fit(X, Y)
    rows = np.resize(X, (1_000_000, 4))
    tracemalloc.start()
    outputs = model.predict(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6, f"{peak / 1e6:.0f} MB"
    np.testing.assert_allclose(outputs[-17:], model.predict(rows[-17:]), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(outputs[:1], model.predict(rows[:1]), rtol=1e-11, atol=1e-12)


# -- 19 to 23: constant, collinear, repeated --


def with_column(column):
    return np.insert(X, 2, column, axis=1)


def blind_gates(place=2, offsets=False):
    """Gates that do not look at one column, with the same gates without it."""
    gates = np.random.default_rng(3).standard_normal((4, 15))
    return gates, np.insert(gates, place, 0.0, axis=0)


@pytest.mark.parametrize("value", [0.0, 7.0, 0.1, 1e9])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_constant_feature_is_dropped(value, dtype):
    small, large = blind_gates()
    data = with_column(value).astype(dtype)
    model = regressor(gates=large).fit(data, Y)
    reference = regressor(gates=small).fit(X.astype(dtype), Y)
    assert model.rank_ == 4 and not model.network_.weight[2].any()
    np.testing.assert_allclose(model.predict(data), reference.predict(X.astype(dtype)), rtol=1e-8, atol=1e-8)
    data[:, 2] += 5  # and predictions do not look at it
    np.testing.assert_allclose(model.predict(data), reference.predict(X.astype(dtype)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", [classifier, regressor])
def test_constant_features_alone_are_refused(make):
    for constant in (np.ones((60, 4)), np.zeros((60, 4)), np.tile(X[0], (60, 1)), np.full((60, 1), np.float32(0.1))):
        with pytest.raises(ValueError, match="all features are constant"):
            make().fit(constant, LABELS)
    with pytest.raises(ValueError, match="all features are constant"):
        make().fit(np.repeat(X[:2], 30, axis=0), np.arange(60) % 2, np.repeat([1, 0], 30))


def test_a_nearly_constant_feature_is_named_in_a_warning():
    with pytest.warns(UserWarning, match=r"feature 2\b"):
        model = regressor().fit(with_column(1e8 + 1e-8 * np.sign(X[:, 1])), Y)
    assert model.rank_ == 4 and model.certificate_.status is Status.CERTIFIED
    with pytest.warns(UserWarning, match=r"feature 2\b"):
        model = regressor().fit(with_column(1e9 + X[:, 1] ** 2), Y)
    assert is_honest(model, with_column(1e9 + X[:, 1] ** 2), Y)


@pytest.mark.parametrize("kind", ["duplicate", "multiple", "sum"])
def test_a_redundant_column_changes_nothing(kind):
    column = {"duplicate": X[:, 0], "multiple": -3 * X[:, 1] + 2, "sum": X[:, 0] + X[:, 3]}[kind]
    small, large = blind_gates()
    model = regressor(gates=large, tol=1e-10).fit(with_column(column), Y)
    reference = regressor(gates=small, tol=1e-10).fit(X, Y)
    assert model.rank_ == 4
    assert model.certificate_.objective == pytest.approx(reference.certificate_.objective, rel=1e-9)
    np.testing.assert_allclose(model.predict(with_column(column)), reference.predict(X), rtol=1e-8, atol=1e-8)


def test_one_hot_blocks_lose_one_rank_each():
    blocks = np.hstack([np.eye(3)[RNG.integers(0, 3, 60)], np.eye(4)[RNG.integers(0, 4, 60)], X])
    model = regressor().fit(blocks, Y)
    assert model.rank_ == 2 + 3 + 4 and model.certificate_.status is Status.CERTIFIED
    assert is_honest(model, blocks, Y)


def test_rows_with_equal_features_and_different_targets():
    data, y = np.vstack([X, X[:20]]), np.r_[Y, Y[:20] + 2]
    model = regressor(weight_decay=1e-3).fit(data, y)
    assert model.certificate_.status is Status.CERTIFIED
    assert model.certificate_.objective >= 20 * 0.5 * 2**2 / 2  # the conflict stays in the loss
    np.testing.assert_allclose(model.predict(data)[60:], model.predict(X[:20]), rtol=1e-12)
    few = regressor(activation="relu", weight_decay=1e-6).fit(data[[0, 1, 2, 60]], y[[0, 1, 2, 60]])
    np.testing.assert_allclose(few.predict(X[:1]), [Y[0] + 1], rtol=1e-4)
    assert few.certificate_.objective >= 1 and few.certificate_.status is Status.CERTIFIED
    with pytest.raises(ValueError, match="all features are constant"):
        regressor().fit(np.tile(X[0], (60, 1)), Y)


# -- 24: weights --


@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_rows_of_weight_zero_are_not_there(activation):
    n = 60 if activation == "gated" else 5
    weights = np.tile([1.0, 2.0, 0.0, 0.5, 1.0], n // 5)
    kept = weights > 0
    one = regressor(activation=activation, weight_decay=0.1).fit(X[:n], Y[:n], weights)
    two = regressor(activation=activation, weight_decay=0.1).fit(X[:n][kept], Y[:n][kept], weights[kept])
    np.testing.assert_array_equal(one.predict(X), two.predict(X))
    assert one.fingerprint_ == two.fingerprint_


def test_impossible_weights_are_refused():
    for weights, message in (
        (np.zeros(60), "zero"),
        (np.full(60, -1.0), "[Nn]egative"),
        (-np.eye(60)[0], "[Nn]egative"),
    ):
        with pytest.raises(ValueError, match=message):
            regressor().fit(X, Y, weights)
    with pytest.raises(ValueError, match="at least 2 classes"):
        classifier().fit(X, LABELS, LABELS)


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e12, 1e300])
def test_tiny_and_huge_weights_work(scale):
    model = regressor().fit(X, Y, np.full(60, scale))
    assert model.certificate_.status is Status.CERTIFIED
    np.testing.assert_allclose(model.predict(X), regressor().fit(X, Y).predict(X), rtol=1e-6, atol=1e-6)


def test_weights_over_24_decades_end_with_an_honest_status():
    weights = 10.0 ** np.random.default_rng(0).uniform(-12, 12, 60)
    with quiet():
        model = regressor().fit(X, Y, weights)
    assert np.isfinite(model.predict(X)).all() and is_honest(model, X, Y, weights)


def test_weights_whose_sum_overflows_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="weight"):
        regressor().fit(X, Y, np.full(60, 1e308))


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


# -- 25 to 27: rank decisions, hyperplanes, general position --


@pytest.mark.parametrize("noise", [1e-6, 1e-8, 1e-10, 1e-12, 1e-13, 1e-14, 3e-15, 1e-16])
def test_nearly_collinear_columns_end_with_an_honest_status(noise):
    data = with_column(X[:, 0] + noise * np.random.default_rng(1).standard_normal(60))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = regressor().fit(data, Y)
        assert model.rank_ == (5 if noise > 1e-13 else 4 if noise < 1e-15 else model.rank_)
        assert np.isfinite(model.predict(data)).all() and is_honest(model, data, Y)
        if noise >= 1e-8:
            assert model.certificate_.status is Status.CERTIFIED


def test_a_singular_value_near_the_cut_warns():
    data = with_column(X[:, 0] + 1e-14 * np.random.default_rng(1).standard_normal(60))
    with pytest.warns(UserWarning, match="collinear"):
        regressor(max_iter=1).fit(data, Y)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("offset", [0.0, 0.1, 1e6])
def test_rows_exactly_on_the_hyperplanes_are_certified(seed, offset):
    """Symmetric data and their centre: every gate without offset passes exactly through a row."""
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((20, 3))
    data = np.vstack([half, -half, np.zeros((1, 3))]) + offset
    y = rng.standard_normal(41)
    model = regressor().fit(data, y)
    assert model.certificate_.status is Status.CERTIFIED and is_honest(model, data, y)
    order = rng.permutation(41)
    assert model.certify(data[order], y[order]).status is Status.CERTIFIED


@pytest.mark.parametrize("levels", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_integer_grids_and_integer_gates_are_certified(levels, seed):
    rng = np.random.default_rng(seed)
    data, y = rng.integers(0, levels, (40, 4)).astype(float), rng.standard_normal(40)
    model = regressor(gates=rng.integers(-1, 2, (4, 30)).astype(float)).fit(data, y)
    assert model.certificate_.status is Status.CERTIFIED and is_honest(model, data, y)


def test_a_row_on_a_hyperplane_is_open():
    data = np.array([[-1.0, 0.5], [0.0, -1.0], [1.0, 0.5], [0.0, 0.0]])
    model = regressor(gates=np.array([[1.0], [0.0]]), linear=False, weight_decay=1e-3).fit(data, [5.0, 1.0, 2.0, 3.0])
    hidden = model.transform(data)
    assert not hidden[0].any() and hidden[1:].any(axis=1).all()


# -- 28 to 30: targets --


@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_targets_of_zero_are_trivial(activation):
    n = 60 if activation == "gated" else 5
    model = regressor(activation=activation).fit(X[:n], np.zeros(n))
    assert model.certificate_.status is Status.TRIVIAL and model.certificate_.objective == 0
    assert not model.predict(X).any() and model.certificate_.relative_gap == 0


def test_a_constant_target_is_an_ordinary_program():
    data, largest = X[:5], 3 * np.sqrt(5)
    for activation, gates in (("relu", "trained"), ("gated", np.r_[np.zeros(4), 1.0][:, None])):
        options = PAPER | {"activation": activation, "gates": gates}
        for factor, status in ((1 + 1e-12, Status.TRIVIAL), (0.99, Status.CERTIFIED)):
            model = regressor(weight_decay=factor * largest, **options).fit(data, np.full(5, 3.0))
            assert model.certificate_.status is status
        found = max_weight_decay(data, np.full(5, 3.0), **options)
        assert np.atleast_1d(found) == pytest.approx(largest, rel=1e-14)


def test_an_outlier_of_1e12_is_solved_to_the_relative_gap():
    y = np.r_[1e12, Y[1:]]
    model = regressor().fit(X, y)
    assert model.certificate_.status is Status.CERTIFIED and model.certificate_.relative_gap <= 1e-6


def test_one_class_is_refused_by_name():
    with pytest.raises(ValueError, match=r"2 classes.*'only'"):
        classifier().fit(X, np.full(60, "only"))


@pytest.mark.parametrize(
    "names", [["no", "yes"], [-5, -1], [3, 900], [False, True], [0.0, 1.0], ["a", "Ä", "ß"], [7, -2, 0]], ids=str
)
def test_labels_come_back_as_they_were(names):
    labels = np.array(names)[np.arange(60) % len(names)]
    model = classifier().fit(X, labels)
    assert model.classes_.tolist() == sorted(names) and model.predict(X).dtype == labels.dtype
    single = labels.copy()
    single[1:] = labels[0]
    single[5] = labels[1]
    assert len(classifier().fit(X, single).classes_) == 2


def test_continuous_labels_are_refused():
    with pytest.raises(ValueError, match="continuous"):
        classifier().fit(X, Y)


@pytest.mark.parametrize("loss", ["squared", "logistic", "cross_entropy"])
def test_separable_classes_at_a_tiny_weight_decay_do_not_overflow(loss):
    y = (X[:, 0] > 0).astype(int)
    with np.errstate(over="raise", invalid="raise", divide="raise"), quiet():
        model = classifier(loss=loss, weight_decay=1e-6, max_iter=500).fit(X, y)
        p = model.predict_proba(1e3 * X)
    assert np.isfinite(p).all() and is_honest(model, X, y)
    assert model.score(X, y) == 1


@pytest.mark.parametrize("loss", ["squared", "logistic", "cross_entropy"])
@pytest.mark.parametrize("weight_decay", [1e-3, 1e-30, 1e-200])
def test_formulas_at_a_tiny_weight_decay_do_not_overflow(loss, weight_decay):
    with np.errstate(over="raise", invalid="raise", divide="raise"), quiet():
        model = classifier(activation="relu", loss=loss, weight_decay=weight_decay).fit(X[:4], [0, 1, 1, 0])
        assert np.isfinite(model.predict_proba(X)).all() and model.score(X[:4], [0, 1, 1, 0]) == 1


# -- 34 to 37: parameters --


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("weight_decay", [0, 0.0, -1, 10**400, np.nan, np.inf, "large", np.array([1.0]), None]),
        ("tol", [-1e-6, np.nan, "small", None]),
        ("max_iter", [-1, 1.5, "many"]),
        ("time_limit", [-1, np.nan, "long", 10**400]),
        ("n_gates", [0, -1, 10**400, 1.5, "many", None]),
        ("rank", [0, -1, 0.0, 1.5, np.nan, "full"]),
        ("activation", ["tanh", None, 1]),
        ("loss", ["hinge", None]),
        ("solver", ["adam", None]),
        ("gates", ["some", None]),
        ("random_state", [-1, 2**64, "seed", 0.5]),
        ("callback", [1, "print"]),
    ],
)
def test_invalid_parameters_are_named_at_fit_and_not_before(name, values):
    for value in values:
        model = classifier(**{name: value})
        with pytest.raises(ValueError, match=name):
            model.fit(X, LABELS)
        assert not hasattr(model, "network_")


def test_the_regressor_has_one_loss():
    for loss in ("logistic", "cross_entropy"):
        with pytest.raises(ValueError, match="loss"):
            regressor(loss=loss).fit(X, Y)


@pytest.mark.parametrize("gates", [np.ones((3, 5)), np.ones((6, 5)), np.ones(4), np.empty((4, 0)), np.ones((4, 2, 2))])
def test_gates_of_a_wrong_shape_are_refused(gates):
    with pytest.raises(ValueError, match="gates must have shape"):
        regressor(gates=gates).fit(X, Y)


def test_gates_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="gates must be finite"):
        regressor(gates=np.full((4, 3), np.nan)).fit(X, Y)


@pytest.mark.parametrize("value", [1e-12, 1e-300, TINY])
def test_a_tiny_weight_decay_ends_with_an_honest_status(value):
    with quiet():
        model = regressor(weight_decay=value, max_iter=30).fit(X, Y)
    assert np.isfinite(model.predict(X)).all()
    assert model.certificate_.objective >= 0 and is_honest(model, X, Y)


def test_weight_decay_around_its_maximum_to_the_last_bit():
    largest = max_weight_decay(X, Y, **with_defaults({}))
    for value in (largest, np.nextafter(largest, np.inf), 2 * largest, 1e300, np.finfo(float).max):
        assert regressor(weight_decay=value).fit(X, Y).certificate_.status is Status.TRIVIAL, value
    below = regressor(weight_decay=np.nextafter(largest, 0)).fit(X, Y)
    assert below.certificate_.status in PROVED and is_honest(below, X, Y)


@pytest.mark.parametrize("value", [np.float64(1), np.float32(1), np.int64(1), 1])
def test_weight_decay_of_any_number_type(value):
    model = regressor(weight_decay=value).fit(X, Y)
    assert model.weight_decay_ == 1.0 and type(model.weight_decay_) is float


@pytest.mark.parametrize("solver", ["group_newton", "proximal", "conic"])
@pytest.mark.parametrize("tol", [0, 1e-20])
def test_a_tolerance_below_what_is_attainable_says_so(solver, tol):
    with pytest.warns(ConvergenceWarning, match="below what float64 can prove"):
        model = regressor(tol=tol, solver=solver, max_iter=300, weight_decay=1.0).fit(X, Y)
    assert model.certificate_.status is Status.GAP_OPEN and 0 < model.certificate_.relative_gap < 1e-3


@pytest.mark.parametrize("solver", ["group_newton", "proximal", "conic"])
@pytest.mark.parametrize("options", [{"max_iter": 0}, {"max_iter": 1}, {"time_limit": 0}, {"tol": 1}])
def test_budgets_of_nothing_end_with_an_honest_status(solver, options):
    with quiet():
        model = regressor(solver=solver, **options).fit(X, Y)
    proof = model.certificate_
    assert is_honest(model, X, Y) and proof.status in (Status.GAP_OPEN, Status.CERTIFIED)
    assert model.n_iter_ <= 1 or "tol" in options or solver == "conic"
    expected = {"max_iter": "max_iter", "time_limit": "time_limit", "tol": "tolerance"}[next(iter(options))]
    assert proof.stopped_by == expected


def test_one_gate_works_and_too_many_are_refused_before_they_are_drawn():
    assert regressor(n_gates=1).fit(X, Y).certificate_.status is Status.CERTIFIED
    tracemalloc.start()
    for n_gates in (10**12, 10**30):
        with pytest.raises(MemoryError, match=rf"{n_gates} gates.*bytes.*lower n_gates"):
            regressor(n_gates=n_gates).fit(X, Y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_random_states_are_reproducible():
    for make in (lambda: 7, lambda: np.int64(7), lambda: np.random.RandomState(7)):
        one, two = (regressor(random_state=make()).fit(X, Y) for _ in range(2))
        np.testing.assert_array_equal(one.gates_, two.gates_)
        np.testing.assert_array_equal(one.predict(X), two.predict(X))
    one, two = (regressor(random_state=None).fit(X, Y) for _ in range(2))
    assert not np.array_equal(one.gates_, two.gates_)


@pytest.mark.parametrize("random_state", [None, 0])
@pytest.mark.parametrize("gates", ["data", "whitened"])
def test_the_global_random_state_is_not_touched(random_state, gates):
    before = np.random.get_state()  # noqa: NPY002
    regressor(random_state=random_state, gates=gates).fit(X, Y)
    max_weight_decay(X, Y, random_state=random_state, gates=gates)
    after = np.random.get_state()  # noqa: NPY002
    np.testing.assert_array_equal(before[1], after[1])
    assert before[2:] == after[2:]


# -- 39: floating point --


@pytest.mark.parametrize("make", [classifier, regressor])
def test_minus_zero_is_zero(make):
    data = np.round(X)
    minus = np.where(data == 0, -0.0, data)
    assert (data == 0).any()
    one, two = make().fit(np.abs(data), LABELS), make().fit(np.where(data == 0, -0.0, np.abs(data)), LABELS)
    np.testing.assert_array_equal(one.predict(data), two.predict(minus))
    assert one.fingerprint_ == two.fingerprint_
    targets = np.where(LABELS == 1, 1.0, 0.0)
    one, two = regressor().fit(X, targets), regressor().fit(X, np.where(targets == 0, -0.0, targets))
    assert one.fingerprint_ == two.fingerprint_


@pytest.mark.parametrize("scale", [1e-305, 1e-310, 1e-320])
def test_denormal_data_are_right_or_refused(scale):
    """A weight beyond 1e308 does not exist: then the sentence says so, and no NaN is predicted."""
    data, message = X * scale, ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            predictions = regressor().fit(data, Y).predict(data)
        except ValueError as error:
            message = str(error)
    if message:
        assert scale < 1e-305 and "feature" in message
    else:
        np.testing.assert_allclose(predictions, regressor().fit(X, Y).predict(X), rtol=1e-2, atol=1e-2)


def test_flushing_denormals_to_zero_changes_nothing():
    expected = regressor().fit(X, Y).predict(X)
    if not torch.set_flush_denormal(True):
        return
    try:
        np.testing.assert_allclose(regressor().fit(X, Y).predict(X), expected, rtol=1e-12)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("loss", ["squared", "logistic", "cross_entropy"])
@pytest.mark.parametrize("activation", ["gated", "relu"])
@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_floating_point_errors_raised_by_the_caller_do_not_disturb(loss, activation, scale):
    n = 60 if activation == "gated" else 5
    data, y = scale * X[:n], LABELS[:n].copy()
    y[:2] = 0, 1
    options = {"activation": activation, "loss": loss, "weight_decay": 0.1, "tol": 1e-4}
    expected = classifier(**options).fit(data, y).predict_proba(data)
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = classifier(**options).fit(data, y)
        np.testing.assert_array_equal(model.predict_proba(data), expected)
        far = 1e4 * data if scale < 1e300 else data
        assert np.isfinite(model.predict_proba(far)).all() and np.isfinite(model.transform(far)).all()
        model.certify(data, y)
