"""scikit-learn's full battery for both estimators, no exclusions."""

from sklearn.utils.estimator_checks import parametrize_with_checks

from convexbn import ConvexBNClassifier, ConvexBNRegressor


@parametrize_with_checks([ConvexBNClassifier(), ConvexBNRegressor()])
def test_battery(estimator, check):
    check(estimator)
