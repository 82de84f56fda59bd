"""What a search found, on losses that are given."""

import math

import pytest
from test_search import make_search

from neoflix.arguments.recipes import read_recipe
from neoflix.runtime.errors import UserError
from neoflix.tuning.ladder import Trial
from neoflix.tuning.results import array_command, format_perplexity, make_table, write_results


def finished(folder, losses: dict[float, list[float]], **more):
    """A search whose trials have these losses on its rungs."""
    search = make_search(folder, *losses, **more)
    for trial, values in zip(search.trials, losses.values(), strict=True):
        trial.losses = dict(zip(search.rungs, values, strict=False))
        trial.seconds = dict.fromkeys(trial.losses, 60.0)
    search.save()
    return search


LOSSES = {1e-4: [5.0], 2e-4: [4.0, 3.0, 2.0], 4e-4: [4.1, 3.1], 8e-4: [math.inf]}


def test_the_best_is_written_as_a_recipe_with_the_users_settings(tmp_path):
    said = write_results(finished(tmp_path, LOSSES, dataset="my texts.csv", learning_rate="9"))
    flags, _ = read_recipe(str(tmp_path / "best.yaml"))
    assert flags == {"seed": "1", "dataset": "my texts.csv", "learning_rate": "0.0002"}
    assert any(str(tmp_path / "best.yaml") in line for line in said)
    assert not any("equal" in line.lower() or "edge" in line for line in said)


def test_with_lora_rank_and_alpha_are_written_too(tmp_path):
    write_results(finished(tmp_path, LOSSES, lora={"rank": 16, "alpha": 32.0}))
    flags, _ = read_recipe(str(tmp_path / "best.yaml"))
    assert (flags["lora_rank"], flags["lora_alpha"]) == ("16", "32.0")


def test_the_table_has_a_row_for_each_trial(tmp_path):
    search = finished(tmp_path, LOSSES)
    columns, rows = make_table(search, search.trials[1])
    assert all(len(row) == len(columns) for row in rows)
    assert rows[1] == ["0.0002", "54.60", "20.09", "7.39", "3 min", "best"]
    assert rows[3][1:4] == ["diverged", "", ""]


def test_equal_rates_are_named_and_the_smaller_is_taken(tmp_path):
    losses = {1e-4: [4.0], 2e-4: [4.0, 3.0, 2.001], 4e-4: [4.0, 3.0, 2.0], 8e-4: [4.0]}
    said = " ".join(write_results(finished(tmp_path, losses)))
    assert "rate 0.0002" in said
    assert "qual in effect" in said
    assert read_recipe(str(tmp_path / "best.yaml"))[0]["learning_rate"] == "0.0002"


def test_a_best_rate_at_the_edge_is_named(tmp_path):
    search = finished(tmp_path, {1e-4: [5.0, 4.0, 3.0], 2e-4: [4.0, 3.0, 2.0]})
    search.trials.append(Trial(2, 4e-4, is_late=True, losses={4: 1.0}))
    said = " ".join(write_results(search))
    assert "extended by 0.0004" in said
    assert "highest rate tried" in said


def test_nothing_is_recommended_if_all_diverged(tmp_path):
    with pytest.raises(UserError, match=r"0\.0001.*0\.0002"):
        write_results(finished(tmp_path, {1e-4: [math.inf], 2e-4: [math.inf]}))


def test_the_page_escapes_what_it_shows(tmp_path):
    folder = tmp_path / "a<b>"
    write_results(finished(folder, LOSSES))
    page = (folder / "tune.html").read_text()
    assert "a<b>" not in page
    assert "a&lt;b&gt;" in page


@pytest.mark.parametrize(
    ("loss", "words"), [(None, ""), (math.inf, "diverged"), (3.0, "20.09"), (15.0, "3e+06"), (5000.0, "1e+304")]
)
def test_perplexities_stay_short(loss, words):
    assert format_perplexity(loss) == words


@pytest.mark.parametrize(("numbers", "tasks"), [([0, 1, 2], "0-2"), ([0, 2], "0,2"), ([3], "3")])
def test_the_command_of_an_array(tmp_path, numbers, tasks):
    command = array_command(make_search(tmp_path / "my runs"), numbers)
    assert command.startswith(f"sbatch --array={tasks} launch.sh --config '")
    assert command.endswith("my runs/trials/%a.yaml'")
