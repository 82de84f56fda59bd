"""What gathering a ZeRO-3 checkpoint's weights takes: seconds, and memory beside that of the imports.

    python benchmarks/gather.py                    # GPT-Neo-125M, bf16, two processes; 9 minutes on 2 busy CPU cores
    python benchmarks/gather.py --num_processes 1

Trains one step with "stage3_gather_16bit_weights_on_model_save": false, then gathers the checkpoint in a process of
its own, and again with DeepSpeed's own converter (zero_to_fp32) in another: into pytorch_model.bin of the same dtype,
since its safetensors cannot hold tied weights. Peaks are VmHWM of /proc, pages of mapped files included, less what the
process held before. Ends with a line of JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import GPTNeoConfig, GPTNeoForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import run_job, write_line

from neoflix.checkpoints.manifest import read_manifest
from neoflix.data.sources import find_dataset, read_examples
from neoflix.data.tokenizer import train_tokenizer

MEASURED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import deepspeed.utils.zero_to_fp32
import torch
from neoflix.checkpoints.gather import gather_weights
from neoflix.training.meters import peak_host_bytes
checkpoint = Path(sys.argv[2])
before, began = peak_host_bytes(), time.perf_counter()
if sys.argv[3] == "ours":
    gather_weights(checkpoint)
else:
    deepspeed.utils.zero_to_fp32.convert_zero_checkpoint_to_state_dict(
        str(checkpoint), sys.argv[3], dtype=torch.bfloat16
    )
seconds = time.perf_counter() - began
print(f"\\n{before} {peak_host_bytes()} {seconds}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--checkpoint", help="a checkpoint without whole weights, instead of one made here")
    parser.add_argument("--output", help="JSON lines file to append to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(args.checkpoint or make_checkpoint(Path(folder), args.num_processes))
        theirs = measure(checkpoint, str(Path(folder, "theirs")))
        ours = measure(checkpoint, "ours")
        num_bytes = (checkpoint / "model.safetensors").stat().st_size
        for figures in (ours, theirs):
            figures["peak_per_weights"] = round(figures["peak_bytes"] / num_bytes, 2)
        num_processes = read_manifest(checkpoint)["num_processes"]
        figures = {"num_processes": num_processes, "weights_bytes": num_bytes, "ours": ours, "deepspeed": theirs}
        write_line(figures, args.output)


def make_checkpoint(folder: Path, num_processes: int) -> Path:
    """A ZeRO-3 checkpoint of a GPT-Neo-125M with fresh weights, after one step, without whole weights."""
    texts = [example.completion for example in read_examples(find_dataset("sample"), "description")]
    model = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=50304, hidden_size=768, num_layers=12, num_heads=12, attention_types=[[["global", "local"], 6]]
        )
    )
    model.save_pretrained(folder / "model")
    train_tokenizer(texts, 4096, folder / "cache").save_pretrained(folder / "model")
    config = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    config["zero_optimization"] = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    (folder / "zero3.json").write_text(json.dumps(config))
    words = {
        "model_name_or_path": folder / "model",
        "dataset": "sample",
        "output_dir": folder / "run",
        "cache_dir": folder / "cache",
        "deepspeed": folder / "zero3.json",
        "bf16": "true",
        "use_cpu": "true",
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    run_job("train.py", [str(word) for name, value in words.items() for word in (f"--{name}", value)], num_processes)
    return folder / "run" / "checkpoint-1"


def measure(checkpoint: Path, how: str) -> dict:
    """Runs one gathering in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(ROOT), str(checkpoint), how], capture_output=True, text=True, check=True
    )
    before, peak, seconds = done.stdout.strip().splitlines()[-1].split()
    return {"seconds": round(float(seconds), 1), "peak_bytes": int(peak) - int(before), "imports_bytes": int(before)}


if __name__ == "__main__":
    main()
