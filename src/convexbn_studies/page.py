"""The page of a study: the claim, what decides it, how the run differs from the paper, pictures, table."""

from __future__ import annotations

from collections.abc import Iterator

from convexbn.files.html import Html, facts, folded, page, paragraph, picture, styled, table, text
from convexbn_studies.runner import Run
from convexbn_studies.study import Finding

_WORDS = {True: ("holds", "holds here"), False: ("fails", "does not hold here"), None: ("", "not decided here")}


def study_page(run: Run) -> bytes:
    """HTML of what is finished of a run.

    Raises
    ------
    ValueError
        When nothing is.
    """
    if not run.finished:
        raise ValueError(f"nothing of {run.study.name} is finished, so there is nothing to draw.")
    told = run.circumstances()
    footer = [facts({name: _told(value) for name, value in told.items()})]
    return page(run.study.title, _parts(run), footer)


def verdict(finding: Finding) -> str:
    """A finding as a line of plain text."""
    return f"{_WORDS[finding.holds][1].upper()}: {finding.claim} {finding.figure}"


def _parts(run: Run) -> Iterator[Html]:
    study = run.study
    yield paragraph(study.source, "quiet")
    if not run.complete:
        yield paragraph(f"This is a part of the study: {len(run.finished)} of {len(run.cells)} cells are finished.")
    if run.quick:
        yield paragraph(
            "This is the quick form of the study, weaker as evidence: smaller, and on scikit-learn's digits where the "
            "full form has larger images."
        )
    findings = run.findings
    with styled():
        pictures = [picture(drawn.title, drawn.figure) for drawn in study.pictures(run.rows)]
    yield from map(_claim, findings[:1])
    if len(findings) > 1:
        yield paragraph(_summary(findings))
    yield from pictures[:1]
    yield Html(f"<h2>How this run differs from the paper</h2>{paragraph(study.departures)}")
    if len(findings) > 1:
        yield Html("<h2>What else it shows</h2>")
        yield from map(_claim, findings[1:])
    yield from pictures[1:]
    yield Html("<h2>Table</h2>")
    yield folded(f"{len(run.rows)} lines", [table(run.rows, f"are in {run.path('csv').name}")])


def _summary(findings: list[Finding]) -> str:
    """How many claims hold, and by name those that do not."""
    told = f"{sum(finding.holds is True for finding in findings)} of {len(findings)} claims hold here."
    for holds, words in ((False, "does not hold"), (None, "is not decided")):
        told += "".join(f" This {words}: {finding.claim}" for finding in findings if finding.holds is holds)
    return told


def _claim(finding: Finding) -> Html:
    css, word = _WORDS[finding.holds]
    return Html(
        f'<section class="claim {css}"><span class="word">{text(word)}</span>'
        f"<p><strong>{text(finding.claim)}</strong></p>{paragraph(finding.figure)}</section>"
    )


def _told(value: object) -> str:
    return ", ".join(f"{name} {number}" for name, number in value.items()) if isinstance(value, dict) else str(value)
