"""Text measures against definitions written out by hand and by brute force."""

import json
import math
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch

from prism_pipelines.evaluation import text, text_models


def test_js_distance_by_hand():
    # P = {a: 1/2, b: 1/2}, Q = {a: 1}: M = {a: 3/4, b: 1/4}
    p_to_m = 0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25)
    q_to_m = math.log2(1 / 0.75)
    expected = math.sqrt((p_to_m + q_to_m) / 2)
    assert text.ngram_distance(["ab"], ["aa"], n=1) == pytest.approx(expected, abs=1e-12)
    assert text.ngram_distance(["aa"], ["ab"], n=1) == pytest.approx(expected, abs=1e-12)


def test_js_distance_is_zero_for_equal_one_for_disjoint_and_a_metric_between():
    a, b, c = ["one two two"], ["two three one"], ["three three four one"]
    assert text.ngram_distance(a, a, n=2) == 0.0
    assert text.ngram_distance(["aaa"], ["bbb"], n=2) == 1.0
    distances = [text.ngram_distance(x, y, n=1, unit="word") for x, y in [(a, b), (b, c), (a, c)]]
    assert distances[2] <= distances[0] + distances[1]


def test_ngrams_do_not_cross_from_one_text_to_the_next():
    assert text.ngram_distance(["ab", "ba"], ["abba"], n=2) > 0  # only the one long text has "bb"


def test_known_words_count_repetition_and_ignore_case_and_punctuation():
    assert text.words("Don't stop, DON'T 42 x_y!") == ["don't", "stop", "don't", "x", "y"]
    assert text.known_word_share(["The cat, the zog."], {"the", "cat"}) == 3 / 4


def test_entropy_and_distinct_by_hand():
    uniform = text.unigram_entropy([[1, 2, 3, 4], [7, 7, 7, 7]])
    assert uniform == pytest.approx((math.log(4) + 0) / 2)
    assert text.distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # 12 21 12 | 12


def brute_self_bleu(sequences):
    scores = []
    for i, own in enumerate(sequences):
        others = [s for j, s in enumerate(sequences) if j != i]
        logs = []
        for n in range(1, 5):
            grams = [tuple(own[k : k + n]) for k in range(len(own) - n + 1)]
            if not grams:
                continue
            hits = 0
            for gram, count in Counter(grams).items():
                in_others = [[tuple(o[k : k + n]) for k in range(len(o) - n + 1)].count(gram) for o in others]
                hits += min(count, max(in_others))
            logs.append(math.log((hits or 0.1) / len(grams)))
        closest = min((abs(len(o) - len(own)), len(o)) for o in others)[1]
        penalty = min(1.0, math.exp(1 - closest / len(own)))
        scores.append(penalty * math.exp(sum(logs) / len(logs)))
    return sum(scores) / len(scores)


def test_self_bleu_agrees_with_counting():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sequences = [rng.integers(0, 4, size=rng.integers(1, 12)).tolist() for _ in range(rng.integers(2, 6))]
        assert text.self_bleu(sequences) == pytest.approx(brute_self_bleu(sequences), abs=1e-12)


def test_self_bleu_is_one_for_copies_and_undefined_for_one():
    assert text.self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1.0)
    assert text.self_bleu([[1, 2, 3]]) is None


def test_perplexity_pools_tokens_not_texts_and_brings_its_diversity():
    losses = {"one two": [1.0, 3.0], "three": [2.5]}
    found = text_models.generative_perplexity(list(losses), lambda texts: [losses[t] for t in texts])
    assert found["perplexity"] == pytest.approx(math.exp(6.5 / 3)) and found["tokens"] == 3 and found["n"] == 2
    assert math.exp(2) - 1e-9 <= found["low"] <= found["perplexity"] <= found["high"] <= math.exp(2.5) + 1e-9
    assert found["diversity"] == text.diversity(list(losses))


def test_repetition_that_a_judge_likes_is_seen_in_the_diversity():
    dull, varied = ["a a a a a a"] * 3, ["the cat sat on my mat", "we went out for a walk", "rain fell all night long"]
    judge = lambda texts: [[0.1 if t.startswith("a a") else 3.0] for t in texts]  # noqa: E731
    low, high = (text_models.generative_perplexity(t, judge) for t in (dull, varied))
    assert low["perplexity"] < high["perplexity"] and low["diversity"]["entropy"] < high["diversity"]["entropy"]
    assert low["diversity"]["self_bleu"] == pytest.approx(1.0) and low["diversity"]["distinct_1"] == 1 / 18


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=6, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3, "?": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder, model.eval()


def test_a_judge_scores_every_token_but_the_first_once_in_windows(judge_folder):
    folder, model = judge_folder
    ids = [0, 1, 2, 3, 0, 0, 1, 3, 2]
    (found,) = text_models.load_judge(str(folder), max_length=4)([" ".join("abcd"[i] for i in ids)])
    expected = []
    for i in range(1, len(ids)):
        start = (i - 1) // 3 * 3  # windows 0..3, 3..6, 6..9: the last of one is the first of the next
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:i]])).logits[0, -1]
        expected.append(-logits.log_softmax(-1)[ids[i]].item())
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_judge_that_sees_later_tokens_is_refused(judge_folder, tmp_path):
    from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

    for is_decoder in (True, False):
        config = BertConfig(
            vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
        config.is_decoder = is_decoder
        BertLMHeadModel(config).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(judge_folder[0]).save_pretrained(tmp_path)
        if is_decoder:
            assert callable(text_models.load_judge(str(tmp_path)))
        else:
            with pytest.raises(ValueError, match="not causal"):
                text_models.load_judge(str(tmp_path))


def test_the_featuriser_gives_the_last_hidden_state_of_the_last_token(judge_folder):
    folder, model = judge_folder
    with torch.no_grad():
        expected = model.transformer(torch.tensor([[0, 1, 2]])).last_hidden_state[0, -1]
    np.testing.assert_allclose(text_models.load_featurizer(str(folder))(["a b c", "d"])[0], expected, atol=1e-5)


def test_a_missing_judge_and_a_text_of_one_token_are_named(judge_folder, tmp_path):
    with pytest.raises(ValueError, match=r"judge.*nowhere"):
        text_models.generative_perplexity(["a b"], str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"0 tokens.*`texts`\[1\]"):
        text_models.generative_perplexity(["a b", "a"], str(judge_folder[0]))


def features(texts):
    return np.array([[len(t), t.count("a")] for t in texts], dtype=np.float32)


def test_mauve_records_n_seeds_and_clusters(monkeypatch):
    asked = []

    def compute_mauve(*, p_features, q_features, num_buckets, seed, verbose):
        asked.append((p_features.shape, q_features.shape, num_buckets, seed))
        return types.SimpleNamespace(mauve=0.5 + seed / 10)

    monkeypatch.setitem(sys.modules, "mauve", types.SimpleNamespace(compute_mauve=compute_mauve))
    found = text_models.mauve_score(["a b"] * 40, ["a c"] * 30, features, seeds=(0, 2))
    assert asked == [((40, 2), (30, 2), 3, 0), ((40, 2), (30, 2), 3, 2)]
    assert found["mauve"] == pytest.approx(0.6) and (found["min"], found["max"]) == (0.5, 0.7)
    assert (found["n"], found["n_reference"], found["num_clusters"]) == (40, 30, 3)
    assert found["featurizer"] == "features" and found["seeds"] == [0, 2]


def test_mauve_without_its_extra_or_with_too_few_samples_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ImportError, match=r'pip install "prism-pipelines\[text\]"'):
        text_models.mauve_score(["a"] * 20, ["b"] * 20, features)
    with pytest.raises(ValueError, match=r"as many samples as clusters.*5 texts.*num_clusters=8"):
        text_models.mauve_score(["a"] * 5, ["b"] * 20, features, num_clusters=8)


@pytest.mark.parametrize(
    ("texts", "error", "names"),
    [
        ([], ValueError, "`texts` is empty"),
        (["fine", "  "], ValueError, r"`texts`\[1\] is empty"),
        (["half [MASK] done"], ValueError, r"\[MASK\]"),
        (["over<|endoftext|>"], ValueError, "endoftext"),
        (["fine", 3], TypeError, "int at 1"),
    ],
)
def test_unfinished_or_missing_text_gets_no_score(texts, error, names):
    for measure in (
        lambda: text_models.evaluate_text(texts, ["held out"]),
        lambda: text_models.generative_perplexity(texts, len),
    ):
        with pytest.raises(error, match=names):
            measure()


def test_evaluate_text_puts_the_measures_together():
    texts, reference = ["the cat sat", "a dog ran"], ["the dog sat", "a cat ran off"]
    found = text_models.evaluate_text(texts, reference, judge=lambda texts: [[1.0, 1.0]] * len(texts))
    assert found["ngram_js"]["word_2"] == text.ngram_distance(texts, reference, n=2, unit="word")
    assert found["known_words"] == 1.0 and found["mauve"] is None and (found["n"], found["n_reference"]) == (2, 2)
    assert found["perplexity"]["perplexity"] == pytest.approx(math.e)
    assert text_models.evaluate_text(texts, reference, vocabulary={"the"})["known_words"] == 1 / 6


def test_texts_are_read_from_every_format(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n"two"\n')
    (tmp_path / "a.json").write_text(json.dumps(["one", {"text": "two"}]))
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert text.read_texts(tmp_path / "a.jsonl") == text.read_texts(tmp_path / "a.json") == ["one", "two"]
    assert text.read_texts(tmp_path / "a.txt") == ["one\ntwo"]
    (tmp_path / "c.jsonl").write_text('{"text": "one\u2028two\x85"}\r\n"three"\n', encoding="utf-8")
    assert text.read_texts(tmp_path / "c.jsonl") == ["one\u2028two\x85", "three"]
    (tmp_path / "b.jsonl").write_text('{"txt": "one"}')
    for name, match in (("b.jsonl", "entry 0"), ("b.csv", "csv")):
        (tmp_path / "b.csv").write_text("x")
        with pytest.raises(ValueError, match=match):
            text.read_texts(tmp_path / name)


class Letters:
    """Stands in for a pipeline: each row's letters come from its own generator."""

    mask_token_id, tokenizer, stuck = 9, object(), False

    def __call__(self, *, num_samples, gen_length, num_inference_steps, generator):
        assert len(generator) == num_samples
        ids = torch.stack([torch.randint(0, 3, (gen_length,), generator=one) for one in generator])
        if self.stuck:
            ids[0, 0] = 9
        return types.SimpleNamespace(sequences=ids, texts=["".join("abc"[i] for i in row if i < 3) for row in ids])


def test_samples_depend_on_seed_and_place_alone_and_masks_are_refused():
    pipe = Letters()
    whole = text.pipeline_texts(pipe, 7, 20, 4, seed=1, batch_size=7)
    assert text.pipeline_texts(pipe, 7, 20, 4, seed=1, batch_size=3) == whole and len(set(whole)) == 7
    assert not set(text.pipeline_texts(pipe, 7, 20, 4, seed=2)) & set(whole)
    pipe.stuck = True
    with pytest.raises(ValueError, match="1 masks are left"):
        text.pipeline_texts(pipe, 7, 20, 4, seed=1)
