"""Names of the files in a run's folder."""

from neoflix.checkpoints.manifest import MANIFEST
from neoflix.model.folder import ADAPTERS_CONFIG_FILE, ADAPTERS_FILE, SETTINGS_FILES, WEIGHTS_FILES

RUN_FILE = "run.json"  # the run's record (runs.py)
LIST_FILE = "run_files.json"  # which files are the run's own (ownership.py)
LOCK_FILE = "_run.lock"  # when Trainer uploads a folder, it leaves out names that begin with an underscore
STATE_FILE = "trainer_state.json"
RESULTS_FILE = "all_results.json"  # written last of all: the run is finished
STARTS_FILE = "starts.json"  # the facts about each start of the run
LIVE_SAMPLES_FILE = "progress_samples.jsonl"  # texts of each evaluation, one a line
RECORD_FILES = (LIST_FILE, RUN_FILE, STARTS_FILE, STATE_FILE, RESULTS_FILE, LIVE_SAMPLES_FILE)

LATEST_FILE = "latest"  # DeepSpeed's: names the folder of the checkpoint that holds the optimizer
UNIVERSAL = ".universal"  # suffix of a checkpoint's form for another number of processes (world_size.py)

# Files of a checkpoint that only training needs.
TRAINING_FILES = (MANIFEST, STATE_FILE, LATEST_FILE, "scheduler.pt", "training_args.bin")

# Files that a run writes at the top at its end. Those of rare tokenizers are not known before then.
MODEL_NAMES = (
    *(*WEIGHTS_FILES, ADAPTERS_FILE, ADAPTERS_CONFIG_FILE, "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
OLDER_NAMES = {*MODEL_NAMES, *SETTINGS_FILES}  # that older versions may have written there
