"""Did the training work? Verdicts and remarks on runs of every kind."""

import pytest
from conftest import make_record

from neoflix.reporting.verdict import judge_run, list_remarks

VERDICTS = {
    "improves": (make_record([6, 5], [8, 6, 5.995]), "yes", []),
    "still learning": (make_record([6, 5], [8, 6, 5]), "yes", ["--num_train_epochs"]),
    "overfits": (make_record([6, 5, 4, 3], [8, 5, 4, 4.5, 5]), "yes", ["overfits after step 20"]),
    "rises with the training loss": (make_record([6, 5, 7, 8], [8, 5, 4, 4.5, 5]), "yes", []),
    "no better": (make_record([6, 5], [4, 4.5, 4.2]), "no", ["--learning_rate"]),
    "unfinished": (make_record([6], [8, 5], finished=False, max_steps=90), "yes", ["step 10 of 90"]),
    "early": (make_record([6, 5], [8, 5, 5], max_steps=90), "yes", ["--early_stopping_patience"]),
    "few": (make_record([6, 5], [8, 6, 6], texts=200), "yes", ["only 200 training texts"]),
    "few held out": (make_record([6, 5], [8, 6, 6], held=20), "yes", ["Only 20 texts were held out"]),
    "from scratch": (make_record([6, 5], [8, 6, 6], model="demo"), "yes", ["writes no sentences"]),
    "skipped": (make_record([6, 5], [8, 6, 6], skipped=4), "yes", ["4 of 20 steps were skipped"]),
    "not measured": (make_record([6], []), "unknown", []),
    "untouched alone": (make_record([6], [5]), "unknown", []),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict(case):
    run, verdict, remarks = VERDICTS[case]
    assert judge_run(run)[0] == verdict
    said = list_remarks(run)
    assert len(said) == len(remarks), said
    for remark, sentence in zip(remarks, said, strict=True):
        assert remark in sentence
