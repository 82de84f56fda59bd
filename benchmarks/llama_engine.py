"""llama.cpp on an exported GGUF file, by `xllamacpp`: its server in this process, asked by HTTP on this machine.

Used by `gguf_files.py` and by the tests.
"""

import http.client
import json
from contextlib import closing
from pathlib import Path

import xllamacpp
from transformers import PreTrainedTokenizerBase

FORCED = 1000.0  # a logit bias that makes its token the only one
GARBLED = "\ufffd"  # what an incomplete UTF-8 sequence is shown as


class LlamaEngine:
    """A GGUF file, loaded.

    Args:
        is_exact: keys and values are cached in fp32 and attention is the plain one. llama.cpp's defaults are fp16 and
            flash attention.
        context: tokens; 0: the file's.
    """

    def __init__(self, gguf: Path, is_exact: bool = True, context: int = 0, threads: int = 1):
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if is_exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)
        self._address = self._server.listening_address.removeprefix("http://")

    def close(self) -> None:
        self._server = None  # which ends it

    def ask(self, path: str, **request) -> dict:
        """The server's answer to a request; errors are answers too."""
        # A new connection each time: the server closes one that is idle for seconds.
        with closing(http.client.HTTPConnection(self._address)) as connection:
            connection.request("POST" if request else "GET", path, json.dumps(request) if request else None)
            return json.loads(connection.getresponse().read())

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a prompt, with the beginning token."""
        return self.ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def write(self, prompt: str, max_new_tokens: int, **settings) -> str:
        """What follows the prompt; greedily, unless `settings` say otherwise."""
        settings = {"temperature": 0, **settings}
        return self.ask("/completion", prompt=prompt, n_predict=max_new_tokens, **settings)["content"]

    def score(self, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, float]]:
        """(likeliest token, log-probability of the text's own token) at each place of a text after its first token."""
        return [self._score_place(ids[:place], ids[place], tokenizer) for place in range(1, len(ids))]

    def _score_place(self, before: list[int], token: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, float]:
        # The server gives probabilities of the token that it draws, and only if that token is whole characters.
        is_whole = GARBLED not in tokenizer.decode([token])
        drawn = token if is_whole else tokenizer.convert_tokens_to_ids("a")
        answer = self.ask(
            "/completion",
            prompt=before,
            n_predict=1,
            n_probs=1 if is_whole else len(tokenizer),
            logit_bias=[[drawn, FORCED]],
            samplers=[],
            cache_prompt=True,
        )
        (place,) = answer["completion_probabilities"]
        likely = place["top_logprobs"]
        found = place if is_whole else next(entry for entry in likely if entry["id"] == token)
        assert found["id"] == token
        return likely[0]["id"], found["logprob"]
