"""Pages: escaped, bounded, of one file alone, and shown by a browser without a complaint."""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from convexbn import ConvexBNClassifier, ConvexBNRegressor, cli, fit_path
from convexbn.cli.model_page import Subject, report
from convexbn.files.html import MAX_PICTURE_BYTES, facts, page, paragraph, picture, styled, table, text
from convexbn_studies import Finding, Picture, Study
from convexbn_studies.page import study_page
from convexbn_studies.runner import Run

HOSTILE = ["<script>alert(1)</script>", "\" onmouseover='x'", "a&b\x00\ud800", "é" * 5000, "$x^{2$ </svg>", "]]>"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
RNG = np.random.default_rng(3)
X = RNG.standard_normal((60, 6))
Y = np.tanh(X[:, 0]) + 0.1 * RNG.standard_normal(60)


class Elements(HTMLParser):
    """Tags and attributes of a document."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes


def elements(document):
    parser = Elements()
    parser.feed(document.decode())
    return parser


def check_alone(document):
    """Nothing is fetched and nothing is run, whatever the names are."""
    found = elements(document)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    assert [name for name, _ in found.attributes if name.startswith("on")] == []
    links = [value for name, value in found.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert "@import" not in document.decode() and not re.search(r"url\((?!['\"]?#)", document.decode())
    identifiers = [value for name, value in found.attributes if name == "id"]
    assert len(set(identifiers)) == len(identifiers)
    assert {link[1:] for link in links if link.startswith("#")} <= set(identifiers)


def figure(points=20, name="value (units)", style="-"):
    with styled():
        axes = Figure(figsize=(5.6, 3.6)).subplots()
    axes.plot(np.arange(points), RNG.standard_normal(points), style)
    axes.set(xlabel="index", ylabel=name)
    return axes.figure


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_are_text(name):
    document = page(name, [paragraph(name), facts({name: name}), table([{name: name, "number": 1.5}])])
    check_alone(document)
    found = elements(document)
    assert found.tags.count("td") == 2 and found.tags.count("p") == 1 and found.tags.count("h1") == 1
    assert len(document) < 30_000


def test_text_is_bounded_and_keeps_what_it_can():
    assert text("a" * 5000).endswith("a…") and len(text("a" * 5000)) == 2000
    assert text("1 < 2 & 3\t\n\x07\udcff") == "1 &lt; 2 &amp; 3\t\n"


def test_long_and_wide_tables_are_cut_and_say_so():
    made = table([{f"c{j}": i for j in range(50)} for i in range(300)], "are in there")
    assert made.count("<tr>") == 201 and made.count("<th ") == 40
    assert "100 rows and 10 columns more are in there." in made
    assert "more" not in table([{"a": 1}])


def test_numbers_stand_right_and_words_left():
    made = table([{"a": 1.23456789, "b": "x", "c": None}, {"a": 2, "b": 3, "c": True}])
    assert ('<td class="number">1.2346</td><td>x</td>' in made and "<td>yes</td>" in made) or ">yes<" in made


def test_pictures_are_own_elements_that_fit():
    parts = [picture(f"Picture {i} <b>", figure()) for i in (1, 2)]
    check_alone(page("Two", parts))
    for part in parts:
        start, end = part.index("<svg"), part.index("</svg>") + len("</svg>")
        root = ElementTree.fromstring(part[start:end])
        assert root.get("viewBox") and root.get("width") is None and root.get("role") == "img"
        assert "<text" in part and "index" in part and "metadata" not in part


def test_a_picture_of_many_points_becomes_an_image_within_the_bound():
    part = picture("Many", figure(20_000, style="."))
    assert len(part.encode()) < MAX_PICTURE_BYTES + 1000 and "data:image/png" in part and "<text" in part
    check_alone(page("Many", [part]))


def test_a_picture_that_cannot_be_made_small_is_refused(monkeypatch):
    monkeypatch.setattr("convexbn.files.html.MAX_PICTURE_BYTES", 2000)
    with pytest.raises(ValueError, match="more than 2000: draw fewer points"):
        picture("Text", figure())


def subject(**changes):
    """A report on a small regression."""
    model = ConvexBNRegressor(n_gates=20, random_state=0).fit(X, Y)
    given = {
        "name": "m", "model": model, "certificate": model.certify(X, Y), "data": "d", "X": X, "y": Y, "target": "t",
        "feature_names": [f"f{i}" for i in range(6)],
    }  # fmt: skip
    return Subject(**given | changes)


def test_a_report_tells_what_was_computed():
    known = subject()
    document = report(known).decode()
    proof = known.certificate
    for told in (f"{proof.objective:.9g}", f"{proof.lower_bound:.9g}", "CERTIFIED", "these gates", "f0", "R^2"):
        assert told in document
    assert f"{known.model.score(X, Y):.4f}" in document and document.count("<svg") == 4
    assert "other rows than it was trained on" in report(subject(own_rows=False)).decode()


def test_a_report_of_hostile_names_is_harmless_and_bounded():
    document = report(subject(name=HOSTILE[0], data=HOSTILE[1], target=HOSTILE[3], feature_names=HOSTILE))
    check_alone(document)
    assert len(document) < 500_000


@pytest.mark.parametrize("count", [3, 40])
def test_a_report_of_classes_with_hostile_names(count):
    names = np.array((HOSTILE[:2] + [f"<i>{i}" for i in range(count)])[:count])
    labels = names[np.arange(len(X)) % count]
    model = ConvexBNClassifier(n_gates=5, weight_decay=1.0, random_state=0).fit(X, labels)
    given = {"model": model, "certificate": model.certificate_, "y": labels, "X_test": X[:7], "y_test": labels[:7]}
    document = report(subject(**given))
    check_alone(document)
    assert ("lowest recall" in document.decode()) == (count == 40)
    assert "accuracy on the rows held out" in document.decode()


def test_a_report_draws_the_path_it_was_chosen_from():
    path = list(fit_path(ConvexBNRegressor(n_gates=10, random_state=0), X, Y, weight_decays=[1, 0.1], ranks=[2, None]))
    document = report(subject(model=path[-1].model, certificate=path[-1].certificate), path).decode()
    assert "Score, neurons and gap over the path" in document and "rank 2" in document


def test_an_empty_network_has_a_report():
    model = ConvexBNRegressor(n_gates=5, weight_decay=1e6, random_state=0).fit(X, Y)
    assert "TRIVIAL" in report(subject(model=model, certificate=model.certificate_)).decode()


@pytest.fixture
def files(tmp_path):
    """A data set of a hostile column name, and a model of it."""
    rows = "\n".join(f"{a},{b},{c}" for a, b, c in zip(X[:, 0], X[:, 1], Y, strict=True))
    (tmp_path / "data.csv").write_text(f"<script>x</script>,b,y\n{rows}\n")
    model, data = str(tmp_path / "m.safetensors"), str(tmp_path / "data.csv")
    arguments = ["fit", data, "--target", "y", "--n-gates", "10", "--test-size", "0.2", "--out", model]
    assert cli.main(arguments) == 0
    return model, data


def test_the_command_writes_a_page_beside_the_model(files, tmp_path, capsys):
    assert cli.main(["report", *files]) == 0
    document = (tmp_path / "m.html").read_bytes()
    check_alone(document)
    assert b"&lt;script&gt;x" in document and b"48" in document and b"R^2 on the rows held out" in document
    assert capsys.readouterr().out.endswith("m.html\n")


def test_the_command_refuses_before_any_work(files, tmp_path, capsys):
    model, data = files
    assert cli.main(["report", model, data, "--out", data]) == 1
    assert "would replace what the report is about" in capsys.readouterr().err
    assert cli.main(["report", model, data, "--out", str(tmp_path / "none" / "a.html")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["report", data, data, "--out", str(tmp_path / "b.html")]) == 1
    assert not (tmp_path / "b.html").exists()


def study_document(tmp_path):
    """The page of a study of hostile words, many lines and three pictures."""
    verdicts = [True, False, None] * 2
    findings = [Finding(f"{name} is claimed.", name, holds) for name, holds in zip(HOSTILE, verdicts, strict=True)]
    rows = [{"name": HOSTILE[i % 6], "value": i / 7, "empty": None, "long": "word " * 30} for i in range(400)]
    known = Study(
        "made-up", HOSTILE[0], HOSTILE[1], HOSTILE[3], (), (1, 1), lambda quick: [{"a": 1}], lambda cell: rows,
        lambda rows: findings, lambda rows: [Picture(f"{i} {HOSTILE[i]}", figure()) for i in range(3)],
    )  # fmt: skip
    run = Run(known, True, tmp_path)
    run.go_on()
    return study_page(run)


def test_the_page_of_a_study_is_harmless_and_bounded(tmp_path):
    document = study_document(tmp_path)
    check_alone(document)
    assert len(document) < 600_000 and b"200 rows more are in made-up-quick.csv" in document


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("kind", ["report", "study"])
def test_a_browser_shows_the_page_without_a_complaint(tmp_path, kind, width):
    """No console message, no picture that is not seen, and nothing wider than the window but what scrolls by itself."""
    script = (
        "<script>addEventListener('load', () => { const root = document.documentElement; const broken = "
        "[...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().height < 50).length; "
        "document.title = `${root.scrollWidth <= innerWidth} ${broken}`; });</script>"
    )
    document = report(subject(feature_names=HOSTILE)) if kind == "report" else study_document(tmp_path)
    allowed = document.decode().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    opened = allowed.replace("<details>", "<details open>").replace("</body>", script + "</body>")
    (tmp_path / "page.html").write_text(opened)
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom",
    ]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *options, f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=250
    )
    assert "CONSOLE" not in done.stderr
    assert re.search(r"<title>(.*?)</title>", done.stdout)[1] == "true 0"
