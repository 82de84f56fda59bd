"""Plots as SVG that a page can hold: its own colours, no addresses, nothing where there are no figures."""

import math

from conftest import make_record

from neoflix.reporting.curves import COLOURS, CSS_VARIABLES, GRID, INK, Curve, draw, draw_comparison, draw_run


def test_colours_are_the_pages():
    curves = [Curve(f"run {n}", [1, 2], [1.0, 2.0], n) for n in range(len(COLOURS))]
    svg = draw("Loss & more", "", curves, levels=[("level", 1.5)], best=(2, 2.0)).svg
    for placeholder, variable in CSS_VARIABLES.items():
        assert placeholder not in svg
        assert variable in svg
    assert 'aria-label="Loss &amp; more"' in svg
    assert "http" not in svg
    assert {INK, GRID, *COLOURS} == CSS_VARIABLES.keys()


def test_nothing_to_draw():
    assert draw("Loss", "", []) is None
    assert draw("Loss", "", [Curve("loss", [], []), Curve("loss", [1], [math.nan])]) is None


def test_plots_of_a_run_and_of_two():
    record = make_record([6, 5], [8, 6, 5])
    assert [plot.title for plot in draw_run(record)] == ["Loss", "Perplexity"]
    both = draw_comparison([record, make_record([7], [9, 8])], ["one", "two"])
    assert len(both) == 3
    assert all(name in plot.svg for plot in both for name in ("one", "two"))
