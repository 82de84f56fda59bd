"""Figures by hand and against their definitions; copies and near twins are found, and nothing else is."""

import json
import math
import os
import random
import re
import shutil
import unicodedata
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import ROOT, as_examples, parse_train_args
from transformers import AutoModelForCausalLM

import generate
from neoflix.arguments.generate import parse_generate_args
from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.checkpoints.runs import describe_run, save_results, save_run
from neoflix.checkpoints.start import find_start
from neoflix.data.sources import read_dataset
from neoflix.data.split import split_texts
from neoflix.data.tokenizer import load_tokenizer
from neoflix.data.tokens import tokenize_split
from neoflix.data.words import split_words
from neoflix.judging.base_model import BaseModel, find_base_model
from neoflix.judging.figures import judge, judgement_table
from neoflix.judging.judge import read_training_texts
from neoflix.judging.novelty import NEAR_TWIN, TrainingTexts, jaccard, some, word_trigrams
from neoflix.judging.sweep import draw_sweep, keep_novel, sweep_header, sweep_line
from neoflix.judging.variety import distinct, self_bleu
from neoflix.model.load import load_model
from neoflix.runtime.environment import prepare_environment
from neoflix.runtime.errors import UserError
from neoflix.sampling.sampler import Sampler

TWELVE = "a retired pilot finds one last letter under the ice and flies"


def random_texts(num: int, num_words: int, seed: int) -> list[list[str]]:
    """Texts of few different words, so that runs come again."""
    draw = random.Random(seed)
    return [[f"w{draw.randrange(num_words)}" for _ in range(draw.randrange(0, 14))] for _ in range(num)]


# ---- copies and near twins ------------------------------------------------------------------------------


def test_copies_are_copies_in_any_spelling():
    training = TrainingTexts([TWELVE, "🙂 🙃", "One."])
    for copy in (TWELVE, f"  {TWELVE.upper()}!\n", TWELVE.replace(" ", ", "), "🙂  🙃", "one"):
        assert training.is_copy(copy)
        assert not training.is_novel(copy)
    for other in (TWELVE + " on", TWELVE[:-6], "", "🙂", "two"):
        assert not training.is_copy(other)


def test_near_twins_begin_at_seven_tenths():
    """12 words have 10 trigrams; their first 9 have 7 of these, their first 8 have 6."""
    training = TrainingTexts(["something else that has nothing to do with it", TWELVE])
    words = TWELVE.split()
    assert training.near_twin(" ".join(words[:9])) == 1
    assert training.near_twin(" ".join(words[:8])) is None
    assert training.near_twin(" ".join([*words[:11], "sinks"])) == 1, "9 of 11"
    assert training.near_twin(" ".join([*words[:5], "x", *words[6:]])) is None, "7 of 13"
    assert training.near_twin(" ".join(reversed(words))) is None
    assert training.near_twin("a retired") is None
    assert training.is_novel(" ".join(words[:8]))
    assert not training.is_novel(" ".join(words[:9]))


# Two texts that differ at their end, and one about something else: Chinese, Japanese, Thai, Hindi, Khmer, Arabic.
OTHER_LANGUAGES = [
    (
        "年轻的厨师回到了海边的小镇从此改变了全家人的命运在冬天",
        "年轻的厨师回到了海边的小镇从此改变了全家人的命运于冬天",
        "两个兄弟在火车上开了一家面包店",
    ),
    (
        "引退したパイロットが氷の下で最後の手紙を見つけて飛び立つ。",
        "引退したパイロットが氷の下で最後の手紙を見つけて泣く。",
        "小さな町の市長が泳ぎを学ぶ物語です",
    ),
    (
        "นักบินเกษียณพบจดหมายฉบับสุดท้ายใต้น้ำแข็งแล้วบินไป",
        "นักบินเกษียณพบจดหมายฉบับสุดท้ายใต้น้ำแข็งแล้วร้องไห้",
        "นายกเทศมนตรีเมืองเล็กเรียนว่ายน้ำ",
    ),
    (
        "एक सेवानिवृत्त पायलट को बर्फ़ के नीचे आख़िरी चिट्ठी मिलती है और वह उड़ता है",
        "एक सेवानिवृत्त पायलट को बर्फ़ के नीचे आख़िरी चिट्ठी मिलती है और वह रोता है",
        "छोटे शहर का मेयर तैरना सीखता है",
    ),
    ("អ្នកបើកយន្តហោះចូលនិវត្តន៍រកឃើញសំបុត្រចុងក្រោយក្រោមទឹកកក", "អ្នកបើកយន្តហោះចូលនិវត្តន៍រកឃើញសំបុត្រចុងក្រោយក្រោមផ្ទះ", "អភិបាលក្រុងតូចរៀនហែលទឹក"),
    (
        "طيار متقاعد يجد آخر رسالة تحت الجليد ثم يطير إلى البيت القديم",
        "طيار متقاعد يجد آخر رسالة تحت الجليد ثم يطير إلى البيت",
        "عمدة بلدة صغيرة يتعلم السباحة",
    ),
]


@pytest.mark.parametrize(("text", "twin", "other"), OTHER_LANGUAGES)
def test_near_twins_in_other_languages(text, twin, other):
    training = TrainingTexts([other, text])
    assert training.near_twin(twin) == 1
    assert not training.is_copy(twin)
    assert training.is_copy(f"« {unicodedata.normalize('NFD', text)} »")
    assert training.is_novel(other[: len(other) // 2] + text[: len(text) // 3])


def test_texts_without_spaces_are_judged_in_characters():
    training = TrainingTexts([text for text, *_ in OTHER_LANGUAGES[:3]] + ["第10个冬天", "a b"])
    found = judge(["两年轻的厨师了", "第10个夏天"], training, no_perplexity="none here")
    assert (found.unit, found.unknown_words) == ("characters", None)
    assert (found.samples.mean_words, found.longest_run) == ((7 + 5) / 2, 5)
    table = judgement_table(found)
    assert re.search("longest run shared with a text +5 characters, mean 4.0", table)
    assert re.search("words outside the vocabulary +not measured: the texts have no spaces between words", table)
    assert re.search("mean length, characters +6.0", table)
    found = judge(["一 b c"], TrainingTexts(["a b", "一"]), no_perplexity="none here")
    assert (found.unit, found.unknown_words) == ("words", 1 / 3), "most of the texts' words are words"


def test_a_sweep_without_any_fluency_is_not_drawn(tmp_path):
    found = judge(["两年轻的厨师了"], TrainingTexts(["年轻的厨师"]), no_perplexity="none here")
    assert not draw_sweep({"top_k=1": found}, tmp_path / "sweep.png")
    assert not (tmp_path / "sweep.png").exists()
    assert len(sweep_line("top_k=1", found, 7)) == len(sweep_header(7))


def edited(text: str, num_edits: int, draw: random.Random) -> str:
    words = text.split()
    for _ in range(num_edits):
        words[draw.randrange(len(words))] = draw.choice(["otter", "sun", "mayor"])
    return " ".join(words)


def test_near_twins_are_those_of_brute_force(titles):
    draw = random.Random(0)
    samples = [edited(draw.choice(titles), num, draw) for num in (0, 1, 1, 2, 2, 3) for _ in range(150)]
    training = TrainingTexts(titles)
    all_trigrams = [word_trigrams(split_words(text)) for text in titles]
    found, missed = 0, 0
    for sample in samples:
        trigrams = word_trigrams(split_words(sample))
        true = {i for i, others in enumerate(all_trigrams) if jaccard(trigrams, others) >= NEAR_TWIN}
        twin = training.near_twin(sample)
        assert twin is None or twin in true
        found, missed = found + (twin is not None), missed + (twin is None and bool(true))
    assert found > 300
    assert missed <= 0.01 * found
    assert found + missed < 850, "some are no near twins, and not taken for one"


# ---- runs of words --------------------------------------------------------------------------------------


def longest_by_brute_force(sample: list[str], texts: list[list[str]]) -> int:
    runs = {tuple(words[i:j]) for words in texts for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    mine = [sample[i:j] for i in range(len(sample)) for j in range(i + 1, len(sample) + 1)]
    return max((len(run) for run in mine if tuple(run) in runs), default=0)


@pytest.mark.parametrize("num_words", [2, 5, 40])
def test_longest_runs_are_those_of_brute_force(num_words):
    texts, samples = random_texts(30, num_words, 1), [*random_texts(60, num_words + 2, 2), [], ["new"]]
    longest, novel_trigrams = TrainingTexts([" ".join(words) for words in texts]).common_runs(samples)
    assert longest.tolist() == [longest_by_brute_force(sample, texts) for sample in samples]
    known = {three for words in texts for three in zip(words, words[1:], words[2:], strict=False)}
    mine = [three for words in samples for three in zip(words, words[1:], words[2:], strict=False)]
    assert novel_trigrams == pytest.approx(sum(three not in known for three in mine) / len(mine))


def test_runs_end_where_texts_end():
    """Neither does a run go from one training text into the next, nor from one sample into the next."""
    training = TrainingTexts(["a b c", "d e f", "a b c d"])
    longest, _ = training.common_runs(["c d e".split(), "e f".split(), "a b".split(), "b c d e".split()])
    assert longest.tolist() == [2, 2, 2, 3]


# ---- variety --------------------------------------------------------------------------------------------


def test_distinct_by_hand():
    """7 words, 4 different; 5 pairs, 3 different; 3 triples, 2 different."""
    assert distinct(["a b c".split(), "a b c d".split()]) == (4 / 7, 3 / 5, 2 / 3)
    assert distinct([["a"], []]) == (1.0, 0.0, 0.0)


def bleu_by_definition(text: list[str], references: list[list[str]]) -> float:
    logs = []
    for n in range(1, 5):
        grams = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
        if not grams:
            break
        of_references = [Counter(tuple(r[i : i + n]) for i in range(len(r) - n + 1)) for r in references]
        matched = sum(min(count, max(other[gram] for other in of_references)) for gram, count in grams.items())
        logs.append(math.log((matched or 0.1) / sum(grams.values())))
    if not logs:
        return 0.0
    nearest = min(map(len, references), key=lambda length: (abs(length - len(text)), length))
    brevity = 1.0 if len(text) >= nearest else math.exp(1 - nearest / len(text))
    return brevity * math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize("num_words", [3, 30])
def test_self_bleu_is_its_definition(num_words):
    texts = [*random_texts(40, num_words, 3), ["a", "b"], ["a"]]
    scores = [bleu_by_definition(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert self_bleu(texts) == pytest.approx(sum(scores) / len(scores))


def test_self_bleu_of_known_sets():
    one = "two brothers open a bakery on the last train".split()
    assert self_bleu([one, one, one]) == pytest.approx(1.0)
    assert self_bleu([one]) is None
    texts = [one, "two brothers open a school on the last day".split(), "a school on the moon".split(), ["a", "b"]]
    # sacrebleu 2.6.0: BLEU(tokenize="none", smooth_method="floor", smooth_value=0.1, effective_order=True)
    assert self_bleu(texts) == pytest.approx(0.45157507, abs=1e-6)


def test_some_texts_are_always_the_same_and_in_order():
    assert some(range(100), 200) == list(range(100))
    chosen = some(range(100), 10)
    assert chosen == sorted(chosen) == some(range(100), 10)
    assert len(set(chosen)) == 10


# ---- the judgement --------------------------------------------------------------------------------------


def test_judgement_by_hand():
    training = TrainingTexts([TWELVE, "the mayor of a small town learns to swim"])
    samples = [
        TWELVE.title(),
        " ".join([*TWELVE.split()[:11], "sinks"]),
        "the mayor of the ice learns quibbling",
        "",
    ]
    found = judge(samples, training, ended=0.75, no_perplexity="none here")
    assert (found.copies, found.near_twins, found.novel) == (0.25, 0.5, 0.5)
    assert (found.longest_run, found.mean_longest_run) == (12, (12 + 11 + 3) / 4)
    assert found.unknown_words == 2 / 31, "sinks, quibbling"
    assert found.novel_trigrams == pytest.approx(5 / 25), "one with sinks, four of the mayor's five"
    assert (found.samples.mean_words, found.texts.mean_words) == (31 / 4, 21 / 2)
    assert (found.samples.num_texts, found.texts.num_texts, found.num_training_texts) == (4, 2, 2)
    assert (found.ended, found.no_perplexity, found.samples.perplexity) == (0.75, "none here", None)


def test_nothing_to_judge():
    with pytest.raises(ValueError, match="no training text"):
        TrainingTexts([])
    with pytest.raises(ValueError, match="no sample"):
        judge([], TrainingTexts([TWELVE]))
    found = judge(["", ""], TrainingTexts([TWELVE]))
    assert (found.novel, found.longest_run, found.unknown_words) == (1.0, 0, 0.0)


def test_perplexity_is_the_models_own(model_dir, titles):
    """One text at a time through plain transformers, in eager attention; the longest is cut at the window of 256."""
    base = BaseModel.load(str(model_dir))
    texts = ["One.", *titles[:11], "", " ".join(titles[:20])]
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager").eval().to(base.model.device)
    losses = []
    for text in texts:
        ids = torch.tensor([[0, *base.tokenizer(text)["input_ids"]][:256]], device=model.device)
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        losses += [-logs[i, token].item() for i, token in enumerate(ids[0, 1:])]
    assert base.perplexity(texts) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert base.perplexity([""]) is None


# ---- a run's folder -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(model_dir, titles, tmp_path_factory):
    """A folder as a finished run leaves it, its record included, and the words that it was begun with."""
    folder = tmp_path_factory.mktemp("judged")
    table = folder / "titles.jsonl"
    table.write_text("".join(json.dumps({"plot": text}) + "\n" for text in titles[:100]))
    prepare_environment()
    words = [
        "--use_cpu",
        "true",
        "--deepspeed",
        str(ROOT / "ds_configs" / "cpu.json"),
        "--output_dir",
        str(folder / "run"),
    ]
    words += ["--model_name_or_path", str(model_dir), "--dataset", str(table), "--text_column", "plot"]
    record(words, folder / "cache", validation_fraction=0.2)
    return folder / "run"


def record(words: list[str], cache, validation_fraction: float):
    """What train.py does, but for the training."""
    args = parse_train_args([*words, "--validation_fraction", str(validation_fraction)])
    texts = split_texts(read_dataset(args), validation_fraction)
    tokenizer = load_tokenizer(args.model_name_or_path)
    sampling = SAMPLING_DEFAULTS | {"max_new_tokens": 24}
    torch.manual_seed(0)
    model = load_model(args.model_name_or_path, tokenizer, torch.float32, sampling)
    run = describe_run(args, model, tokenizer, *tokenize_split(texts, tokenizer, 256, cache))
    os.makedirs(args.output_dir, exist_ok=True)
    save_run(args.output_dir, run)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    save_results(args.output_dir, {})
    return run


@pytest.fixture(scope="module")
def sampler(learnt):
    return Sampler.load(learnt, device="cpu")


def generate_words(learnt, *words) -> list[str]:
    return ["--model_dir", str(learnt), "--num_samples", "4", "--seed", "3", *map(str, words)]


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train_side(texts: list[str], validation_fraction: float) -> list[str]:
    return [example.completion for example in split_texts(as_examples(texts), validation_fraction).train]


def test_training_texts_are_the_runs_own_side(learnt, titles, tmp_path):
    def read(*words):
        return read_training_texts(parse_generate_args(list(map(str, words))))

    assert read("--model_dir", learnt) == train_side(titles[:100], 0.2)
    (learnt / "checkpoint-3").mkdir(exist_ok=True)
    assert read("--model_dir", learnt / "checkpoint-3") == train_side(titles[:100], 0.2)
    other = ("--dataset", "sample", "--text_column", "description")
    assert read("--model_dir", learnt, *other) == train_side(titles, 0.2)
    assert read("--model_dir", tmp_path, *other) == train_side(titles, 0.1)
    assert read("--model_dir", tmp_path, "--dataset", "sample", "--validation_fraction", 0) == titles


def test_a_data_set_that_lies_elsewhere_is_the_same_run(learnt, model_dir, tmp_path):
    run = json.loads((learnt / "run.json").read_text())
    moved = run | {"texts": run["texts"] | {"dataset": "/elsewhere.jsonl"}}
    assert find_start(str(learnt), None, moved, None).is_finished
    assert not find_start(str(tmp_path), None, run, None).is_finished
    with pytest.raises(UserError, match="other settings and no complete checkpoint to resume"):
        find_start(str(learnt), None, run | {"data": "other"}, None)


def test_samples_just_made_are_judged_beside_their_file(learnt, model_dir, titles, tmp_path, capsys):
    output = tmp_path / "samples.jsonl"
    generate.main(generate_words(learnt, "--judge", "--output", output))
    table = capsys.readouterr().out
    judged = json.loads((tmp_path / "samples.judged.json").read_text())
    rows = read_rows(output)
    assert judged["samples"]["num_texts"] == judged["texts"]["num_texts"] == len(rows) == 4
    assert judged["num_training_texts"] == len(train_side(titles[:100], 0.2))
    assert judged["base_model"] == str(model_dir)
    base = BaseModel.load(str(model_dir))
    assert judged["samples"]["perplexity"] == pytest.approx(base.perplexity([row["text"] for row in rows]))
    assert f"perplexity under {model_dir}" in table
    assert re.search(r"novel: neither +100.0%", table)

    # The same from the file, without a model.
    (tmp_path / "samples.judged.json").unlink()
    generate.main(["--model_dir", str(learnt), "--judge", str(output)])
    again = json.loads((tmp_path / "samples.judged.json").read_text())
    assert "not measured: no model was loaded" in capsys.readouterr().out
    assert again["samples"]["perplexity"] is None
    for key in judged.keys() - {"samples", "texts", "base_model", "no_perplexity"}:
        assert again[key] == judged[key], key


def test_a_base_that_cannot_be_had_is_said_in_words(learnt, tmp_path, capsys):
    for words, reason in (
        (["--base_model", str(tmp_path / "none")], "--base_model .*no such folder"),
        (["--base_model", "none"], "left out"),
    ):
        generate.main(generate_words(learnt, "--judge", *words))
        assert re.search(f"not measured: .*{reason}", capsys.readouterr().out)
    run = json.loads((learnt / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run | {"model": "demo"}))
    args = parse_generate_args(["--model_dir", str(tmp_path), "--judge"])
    assert find_base_model(args) == (None, "the run began from scratch; name another model with --base_model")
    (tmp_path / "run.json").unlink()
    assert "nothing in" in find_base_model(args)[1]


def test_novel_samples_are_the_same_ones_and_later_ones(sampler):
    """Of eight texts two of the first prompt's are in the training texts, one of them but for its first word."""
    sample = partial(sampler.sample, seed=7, batch_size=3, max_new_tokens=30)
    eight = [one.text for one in sample(["A ", "The "], num_samples=4)]
    longest = max((0, 2, 3), key=lambda i: len(split_words(eight[i])))
    twin = " ".join(["Once", *split_words(eight[longest])[1:]])
    training = TrainingTexts(["Nothing like it.", eight[1], twin])
    assert [i for i, text in enumerate(eight) if not training.is_novel(text)] == sorted([1, longest])
    later = [one.text for one in sample(["A"], num_samples=2, first_index=8)]
    kept = list(keep_novel(sample, training, ["A ", "The "], 4))
    assert [one.text for one in kept] == [text for i, text in enumerate(eight) if i not in (1, longest)] + later
    assert Counter(one.prompt for one in kept) == {"A": 4, "The": 4}


def test_a_model_that_only_repeats_gives_up(sampler):
    sample = partial(sampler.sample, seed=7, top_k=1, max_new_tokens=30)
    training = TrainingTexts([next(sample()).text])
    with pytest.raises(ValueError, match="--novel: 40 texts were drawn and 0 of the 2 asked for are new"):
        list(keep_novel(sample, training, [""], 2))


def test_first_index_goes_on_where_another_call_ended(sampler):
    together = list(sampler.sample(num_samples=5, seed=9, max_new_tokens=8))
    assert list(sampler.sample(num_samples=3, seed=9, max_new_tokens=8, first_index=2)) == together[2:]


def test_novel_on_the_command_line(learnt, tmp_path):
    generate.main(generate_words(learnt, "--prompt", "A young", "--output", tmp_path / "plain.jsonl"))
    plain = read_rows(tmp_path / "plain.jsonl")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"plot": row["text"]}) + "\n" for row in plain[:2]))
    words = ("--prompt", "A young", "--novel", "--dataset", tmp_path / "texts.jsonl", "--validation_fraction", 0)
    generate.main(generate_words(learnt, *words, "--output", tmp_path / "novel.jsonl"))
    novel = read_rows(tmp_path / "novel.jsonl")
    assert novel[:2] == plain[2:]
    assert len(novel) == 4
    assert not {row["text"] for row in novel} & {row["text"] for row in plain[:2]}


def test_sweep_shows_every_combination(learnt, tmp_path, capsys):
    folder = tmp_path / "sweep"
    words = ("--sweep", "temperature=0.5,1.9", "top_k=0,5", "--output", folder, "--max_new_tokens", "12")
    generate.main(generate_words(learnt, *words))
    table = capsys.readouterr().out
    names = [f"temperature={t},top_k={k}" for t in (0.5, 1.9) for k in (0, 5)]
    assert [line.split()[0] for line in table.splitlines() if line.startswith("temperature")] == names
    kept = json.loads((folder / "sweep.json").read_text())["rows"]
    assert [row["settings"] for row in kept] == [{"temperature": t, "top_k": k} for t in (0.5, 1.9) for k in (0, 5)]
    assert all(row["samples"]["perplexity"] > 1 for row in kept)
    assert {path.name for path in folder.iterdir()} == {*(f"{n}.jsonl" for n in names), "sweep.json", "sweep.png"}
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # A setting's samples are those that the same flags bring without a sweep.
    alone = generate_words(learnt, "--temperature", "1.9", "--top_k", "5", "--max_new_tokens", "12")
    generate.main([*alone, "--output", str(tmp_path / "alone.jsonl")])
    assert read_rows(tmp_path / "alone.jsonl") == read_rows(folder / f"{names[3]}.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "temprature=1"], "'temprature' is no sampling setting"),
        (["--sweep", "temperature"], "must be temperature= and numbers"),
        (["--sweep", "temperature=0.7,hot"], "must be temperature= and numbers"),
        (["--sweep", "top_k=1.5"], "must be top_k= and whole numbers"),
        (["--sweep", "temperature=0.7,0"], "--sweep temperature=0.0: must be above 0"),
        (["--sweep", "top_p=0.5", "top_p=0.9"], "top_p was given before"),
        (["--sweep", "top_p=0.5", "--novel"], "leave out --novel"),
        (["--judge", "x.jsonl", "--novel"], "leave out --novel or the file"),
        (["--judge", "x.jsonl", "--output", "y.jsonl"], "leave out --output or the file"),
        (["--judge", "--validation_fraction", "1"], "at least 0 and below 1"),
    ],
)
def test_words_that_make_no_judgement(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_generate_args(words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "the file is empty"),
        ("\n{broken\n", "line 2 is not valid JSON"),
        ('{"text": "a"}\n["a"]\n', "line 2 is not a JSON object"),
        ('{"text": 3}\n', "row 1 has no text"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_files_that_hold_no_samples(learnt, tmp_path, content, message):
    path = tmp_path / "samples.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        generate.main(["--model_dir", str(learnt), "--judge", str(path)])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "samples.judged.json").exists()


def test_texts_that_no_one_names_or_that_have_changed(learnt, model_dir, tmp_path):
    with pytest.raises(ValueError, match="name them with --dataset"):
        generate.main(["--model_dir", str(model_dir), "--judge"])
    changed = shutil.copytree(learnt, tmp_path / "run")
    run = json.loads((changed / "run.json").read_text())
    run["num_training_texts"] += 1
    (changed / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="has changed since the run learnt from it"):
        generate.main(["--model_dir", str(changed), "--judge"])
