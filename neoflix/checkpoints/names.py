"""Names of the files in a run's folder."""

from neoflix.checkpoints.manifest import MANIFEST
from neoflix.model.folder import ADAPTERS_CONFIG_FILE, ADAPTERS_FILE, SETTINGS_FILES, WEIGHTS_FILES

STATE_FILE = "trainer_state.json"


LATEST_FILE = "latest"  # DeepSpeed's: the folder, in a checkpoint, that the optimizer lies in


UNIVERSAL = ".universal"  # a checkpoint's copy for another number of processes (universal.py)


RUN_FILE = "run.json"  # the run's record (runs.py)


RESULTS_FILE = "all_results.json"  # written last of all: the run is finished


STARTS_FILE = "starts.json"  # how the run was started, each time


LIVE_SAMPLES_FILE = "progress_samples.jsonl"  # texts of each evaluation, a line each


# Files of a checkpoint beside its model: what a run needs to go on.
TRAINING_FILES = (MANIFEST, STATE_FILE, LATEST_FILE, "scheduler.pt", "training_args.bin")


LIST_FILE = "run_files.json"


LOCK_FILE = "_run.lock"  # Trainer leaves out names that begin so when it uploads a folder


RECORD_FILES = (LIST_FILE, RUN_FILE, STARTS_FILE, STATE_FILE, RESULTS_FILE, LIVE_SAMPLES_FILE)


MODEL_NAMES = (  # what a run writes at the top at its end; other files, of rare tokenizers, are looked at then
    *(*WEIGHTS_FILES, ADAPTERS_FILE, ADAPTERS_CONFIG_FILE, "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)


OLDER_NAMES = {*MODEL_NAMES, *SETTINGS_FILES}
