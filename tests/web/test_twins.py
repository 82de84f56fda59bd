"""Which training text a sample repeats."""

from neoflix.arguments.generate import parse_generate_args
from neoflix.web.twins import Twin, Twins

TEXT = "A retired pilot finds one last letter under the ice, and flies."


def test_a_copy_and_the_nearest_of_near_duplicates():
    further = TEXT.replace("flies", "flew")
    twins = Twins([further, TEXT])
    assert twins.find(TEXT.upper()) == Twin(True, TEXT)
    assert twins.find(TEXT + " Home.") == Twin(False, TEXT)
    assert twins.find("A pilot flies.") is None


def test_without_the_data_set_nothing_is_marked(run_dir, recorded_run, tmp_path, capsys, monkeypatch):
    twins = Twins.of_run(parse_generate_args(["--model_dir", str(run_dir)]))
    assert twins.find(TEXT) is None
    assert "--dataset" in twins.problem
    assert twins.problem in capsys.readouterr().out
    assert Twins.of_run(parse_generate_args(["--model_dir", str(recorded_run)])).problem is None
    # One that would have to be downloaded is left where it is.
    monkeypatch.setattr("neoflix.data.sources.NETFLIX_PATH", tmp_path / "none.csv")
    twins = Twins.of_run(parse_generate_args(["--model_dir", str(run_dir), "--dataset", "netflix"]))
    assert "netflix: is not on this machine" in twins.problem
