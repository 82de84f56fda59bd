"""The names of a run's files are those that a run writes."""

from neoflix.checkpoints.names import LOCK_FILE, MODEL_NAMES, OLDER_NAMES, RECORD_FILES, TRAINING_FILES


def test_a_finished_run_has_no_file_without_a_name(finished_run):
    names = {path.name for path in finished_run.iterdir() if path.is_file()}
    report = {"README.md", "report.html", "train_results.json", "eval_results.json"}
    assert names - report <= {*MODEL_NAMES, *RECORD_FILES, *TRAINING_FILES, LOCK_FILE}
    assert set(RECORD_FILES) <= names


def test_older_versions_wrote_no_record_into_a_model():
    assert set(MODEL_NAMES) <= OLDER_NAMES
    assert not OLDER_NAMES & set(RECORD_FILES)
