"""scikit-learn's full battery for all estimators, no exclusions."""

from sklearn.utils.estimator_checks import parametrize_with_checks

from convexbn import ConvexBNClassifier, ConvexBNClassifierCV, ConvexBNRegressor, ConvexBNRegressorCV

FEW = {"weight_decays": [1.0, 0.1], "n_gates": 10, "cv": 2}


@parametrize_with_checks(
    [ConvexBNClassifier(), ConvexBNRegressor(), ConvexBNClassifierCV(**FEW), ConvexBNRegressorCV(**FEW)]
)
def test_battery(estimator, check):
    check(estimator)
