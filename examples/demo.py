"""Train a network on real images with a proof of optimality, beside two scikit-learn classifiers.

Run by ``make demo``: prints a table, saves the model and a picture in ``demo/``.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import convexbn
from convexbn.cli.data_sources import read_data, split
from convexbn.estimators.display import CertificateDisplay

FOLDER = Path("demo")


def fit_ours(out: Path) -> dict:
    """``convexbn fit digits``, as anyone would type it."""
    command = ["convexbn", "fit", "digits", "--out", str(out)]
    print("$ " + " ".join(command), flush=True)
    run = subprocess.run(
        [sys.executable, "-m", "convexbn", *command[1:], "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def fit_peer(model, rows) -> tuple[float, float]:
    """Test accuracy and seconds of a scikit-learn classifier on the same split."""
    started = time.perf_counter()
    model.fit(rows.X_train, rows.y_train)
    return model.score(rows.X_test, rows.y_test), time.perf_counter() - started


def main() -> None:
    """Fit the three, print the table, draw the proof."""
    FOLDER.mkdir(exist_ok=True)
    out = FOLDER / "digits.safetensors"
    ours = fit_ours(out)
    rows = split(read_data("digits", None), None, 0, task="auto")
    peers = {
        "LogisticRegression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "MLPClassifier": make_pipeline(StandardScaler(), MLPClassifier(max_iter=500, random_state=0)),
    }
    print(f"\n{'on the same 1437 / 360 digits':32}{'test accuracy':>15}{'seconds':>10}{'certified gap':>16}")
    print(f"{'ConvexBNClassifier':32}{ours['test_score']:15.4f}{ours['seconds']:10.2f}{ours['relative_gap']:16.1e}")
    for name, model in peers.items():
        accuracy, seconds = fit_peer(model, rows)
        print(f"{name:32}{accuracy:15.4f}{seconds:10.2f}{'none':>16}")
    model = convexbn.load(out)
    picture = FOLDER / "digits.png"
    CertificateDisplay.from_estimator(model).plot().figure_.savefig(picture, dpi=110)
    print(f"\n{model.certificate_.status}: {model.certificate_.sentence}")
    print(f"model: {out}   picture: {picture}   check it again: convexbn certify {out} digits")


if __name__ == "__main__":
    main()
