"""What a run records while it goes on."""

import json

from neoflix.checkpoints.names import LIVE_SAMPLES_FILE, STARTS_FILE
from neoflix.reporting.run_log import log_start, read_live_samples, write_live_samples
from neoflix.runtime.files import read_json


def test_no_token_of_a_hub_is_written_down(tmp_path):
    command = "train.py --local_rank=0 --hub_token hf_secret --push_to_hub_token=hf_secret --seed 7"
    log_start(str(tmp_path), {"command": command, "from_step": 0})
    (start,) = read_json(tmp_path / STARTS_FILE, [])
    assert start["command"] == "train.py --hub_token ... --push_to_hub_token=... --seed 7"


def test_a_start_from_the_beginning_replaces_earlier_ones(tmp_path):
    for step in (0, 5, 7):
        log_start(str(tmp_path), {"command": "train.py", "from_step": step})
    assert [start["from_step"] for start in read_json(tmp_path / STARTS_FILE, [])] == [0, 5, 7]
    log_start(str(tmp_path), {"command": "train.py", "from_step": 0})
    (start,) = read_json(tmp_path / STARTS_FILE, [])
    assert start["versions"].keys() >= {"python", "torch", "deepspeed"}
    assert "GiB" in start["hardware"]


def test_samples_are_read_up_to_an_unfinished_line(tmp_path):
    rows = [{"step": step, "epoch": 0.5, "prompt": "A", "text": "A young\u2028pilot"} for step in (2, 4)]
    assert read_live_samples(tmp_path) == []
    write_live_samples(tmp_path, rows)
    with (tmp_path / LIVE_SAMPLES_FILE).open("a") as file:
        file.write(json.dumps(rows[0])[:20])
    assert read_live_samples(tmp_path) == rows
    write_live_samples(tmp_path, [])
    assert not (tmp_path / LIVE_SAMPLES_FILE).exists()
