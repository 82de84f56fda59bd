"""vLLM's side of `generate.py`, which starts this with vLLM's own Python.

It loads the export, answers with vLLM's version, and then answers each line of its input, a number of texts, with the
number of tokens that it wrote. It ends with its input. The only argument is JSON.
"""

import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    import vllm

    asked = json.loads(sys.argv[1])
    engine = vllm.LLM(**asked["engine"])
    never = dict.fromkeys(asked["never"], -100.0)
    settings = vllm.SamplingParams(**asked["settings"], ignore_eos=True, logit_bias=never)
    print(vllm.__version__, file=answers, flush=True)
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": asked["prompt"]}] * int(line)
        results = engine.generate(prompts, settings, use_tqdm=False)
        print(sum(len(result.outputs[0].token_ids) for result in results), file=answers, flush=True)


if __name__ == "__main__":  # vLLM starts processes of its own
    main()
