"""LAMBADA, sentence similarity and the harness against brute force, on tiny random models."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import make_encoder
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_compress.errors import ConfigurationError, NumericalError, UnsupportedModelError
from hf_compress.evaluation import HarnessTasks, Lambada, SentenceSimilarity
from hf_compress.evaluation.examples import read_records, spread
from hf_compress.evaluation.lambada import cut_last_word
from hf_compress.evaluation.similarity import embed, pool, spearman

SENTENCES = (
    "the method returns a list of lines",
    "wrap a single paragraph of text",
    "Return a list of wrapped lines and their width",
    "tabs in text are expanded",
    "the default width is 70",
    "a string",
)


def language_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def passages(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The sentences, and some whose last word is what the model expects."""
    found = list(SENTENCES[:5])
    for sentence in (" ".join(s.split()[:end]) for s in SENTENCES for end in range(1, len(s.split()))):
        ids = tokenizer(sentence)["input_ids"]
        with torch.no_grad():
            text = sentence + tokenizer.decode([int(model(torch.tensor([ids])).logits[0, -1].argmax())])
        if text.startswith(sentence + " ") and len(tokenizer(text)["input_ids"]) == len(ids) + 1 and text[-1] != " ":
            found.append(text)
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_lambada_equals_brute_force(tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    model = language_model(tokenizer)
    texts = passages(model, tokenizer)
    accuracy, perplexity = Lambada(texts, batch_size)(model, tokenizer)
    hits, losses = 0, []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        first = len(tokenizer(text.rpartition(" ")[0])["input_ids"])
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses.append(-sum(float(log_p[at - 1, ids[at]]) for at in range(first, len(ids))))
        hits += all(int(log_p[at - 1].argmax()) == ids[at] for at in range(first, len(ids)))
    assert 0 < hits < len(texts)
    assert max(len(tokenizer(" " + text.split()[-1], add_special_tokens=False)["input_ids"]) for text in texts) > 1
    assert (accuracy.value, accuracy.count) == (hits / len(texts), len(texts))
    share = hits / len(texts)
    assert accuracy.standard_error == pytest.approx(math.sqrt(share * (1 - share) / (len(texts) - 1)))
    assert perplexity.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert not perplexity.higher_is_better


def test_the_last_word_of_other_tokenizers() -> None:
    def with_end(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [*map(ord, text), 0]}

    with_end.eos_token_id = 0  # type: ignore[attr-defined]
    ids, first = cut_last_word("ab  cde ", with_end)
    # The blanks before the word belong to it, the token at the end to neither.
    assert ids.tolist() == [*map(ord, "ab  cde")]
    assert first == 2


def test_lambada_reads_files_and_refuses(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    lines, table = tmp_path / "lines.txt", tmp_path / "rows.jsonl"
    lines.write_text("\n".join(SENTENCES[:4]))
    table.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES[:4]))
    assert Lambada.from_file(lines) == Lambada.from_file(table) == Lambada(list(SENTENCES[:4]))
    assert Lambada.from_file(lines, limit=2).passages == [SENTENCES[0], SENTENCES[2]]
    for text, message in (("word\n", "no last word"), ("", "no example")):
        lines.write_text(text)
        with pytest.raises(ConfigurationError, match=message):
            Lambada.from_file(lines)
    with pytest.raises(ConfigurationError, match="processing_class"):
        Lambada(SENTENCES[:2])(language_model(tokenizer), None)
    with pytest.raises(ConfigurationError, match="positions"):
        Lambada(["word " * 300])(language_model(tokenizer), tokenizer)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),  # this and the last one by SciPy
        ([1, 2, 2, 3], [1, 2, 2, 3], 1.0),
        ([1, 2, 3], [9, 4, 1], -1.0),
        ([1, 1, 2, 2], [1, 2, 1, 2], 0.0),
        ([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], 0.19885368120992467),
    ],
)
def test_spearman(a: list[float], b: list[float], expected: float) -> None:
    found = spearman(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    assert found == pytest.approx(expected, abs=1e-12)


def test_pooling() -> None:
    states = torch.arange(12.0).reshape(1, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0]])
    assert pool(states, mask, "first").tolist() == [[0, 1, 2]]
    assert pool(states, mask, "last").tolist() == [[6, 7, 8]]
    assert pool(states, mask, "mean").tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_similarity_equals_brute_force(kind: str, pooling: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_encoder("bert") if kind == "encoder" else language_model(tokenizer)
    if kind == "encoder":
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    pairs = [(SENTENCES[a], SENTENCES[b]) for a in range(6) for b in range(a)]
    scores = [float((7 * index) % 5) for index in range(len(pairs))]
    (score,) = SentenceSimilarity(pairs, scores, pooling, batch_size=4)(model, tokenizer)
    cosines = []
    for pair in pairs:
        vectors = []
        for sentence in pair:
            ids = torch.tensor([tokenizer(sentence, truncation=True, max_length=16)["input_ids"]])
            with torch.no_grad():
                states = model.base_model(ids).last_hidden_state[0].double()
            vectors.append(states.mean(0) if pooling == "mean" else states[-1])
        cosines.append(torch.cosine_similarity(*vectors, dim=0))
    assert score.value == pytest.approx(spearman(torch.stack(cosines), torch.tensor(scores).double()), abs=1e-9)
    assert (score.count, score.note) == (15, f"{pooling} pooling")


def test_similarity_with_the_models_own_pooler(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_encoder("bert")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        found = embed(model, tokenizer, list(SENTENCES[-1:]), "pooler")
        expected = model(torch.tensor([tokenizer(SENTENCES[-1])["input_ids"]])).pooler_output
    torch.testing.assert_close(found, expected.double())
    with pytest.raises(UnsupportedModelError, match="no pooler"):
        embed(language_model(tokenizer), tokenizer, list(SENTENCES[-1:]), "pooler")


def test_similarity_reads_tables_with_and_without_names(tmp_path: Path) -> None:
    rows = [('He said "no", twice.', "He refused.", "3.5"), ("A.", "B.", "0.0"), ("C.", "D.", "5")]
    expected = SentenceSimilarity([row[:2] for row in rows], [3.5, 0.0, 5.0])
    quoted = '"He said ""no"", twice.",He refused.,3.5\nA.,B.,0.0\nC.,D.,5\n'
    (tmp_path / "bare.csv").write_text(quoted)
    (tmp_path / "named.csv").write_text("sentence1,sentence2,score\n" + quoted)
    (tmp_path / "named.tsv").write_text(
        "genre\tscore\tsentence1\tsentence2\n" + "".join(f"x\t{score}\t{a}\t{b}\n" for a, b, score in rows)
    )
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"sentence1": a, "sentence2": b, "score": float(score)}) + "\n" for a, b, score in rows)
    )
    for name in ("bare.csv", "named.csv", "named.tsv", "rows.jsonl"):
        assert SentenceSimilarity.from_file(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.csv", "a,b,c\nd,e,1\n", "score is no number"),
        ("pairs.csv", "a,b\nd,e\n", "expected the columns sentence1, sentence2, score"),
        ("pairs.txt", "a b 1\n", "expected a .jsonl, .csv or .tsv file"),
        ("pairs.jsonl", '{"sentence1": "a"\n', "cannot be read"),
        ("pairs.jsonl", "[1]\n", "found list"),
        ("pairs.csv", "a,b,1\n", "at least two pairs"),
    ],
)
def test_similarity_refuses_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        SentenceSimilarity.from_file(tmp_path / name)


def test_similarity_refuses_what_cannot_be_ranked(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [(SENTENCES[0], SENTENCES[1]), (SENTENCES[2], SENTENCES[3])]
    with pytest.raises(NumericalError, match="NaN"):
        SentenceSimilarity(pairs, [1.0, 1.0])(language_model(tokenizer), tokenizer)
    with pytest.raises(ConfigurationError, match="unknown pooling"):
        SentenceSimilarity(pairs, [1.0, 2.0], "middle")  # type: ignore[arg-type]


def test_examples_are_spread() -> None:
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread([1, 2], None) == spread([1, 2], 5) == [1, 2]
    with pytest.raises(ConfigurationError, match="is no file"):
        read_records("none.jsonl", ("text",))


def write_task(folder: Path) -> None:
    """A task of multiple choice on a file of this machine."""
    rows = [
        {"question": "the method returns", "choices": [" a list", " a string", " nothing"], "answer": 1},
        {"question": "wrap a single", "choices": [" paragraph", " line of text"], "answer": 0},
        {"question": "tabs in text", "choices": [" are", " expand", " wrap", " of"], "answer": 2},
        {"question": "the default", "choices": [" width", " text"], "answer": 1},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choices.yaml").write_text(
        "task: choices\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(folder / 'rows.jsonl'))}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        'target_delimiter: ""\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )


def test_harness_equals_brute_force(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_task(tmp_path)
    model = language_model(tokenizer)
    (score,) = HarnessTasks(["choices"], tmp_path)(model, tokenizer)
    hits = 0
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        totals = []
        for choice in row["choices"]:
            # The harness adds a beginning only where the tokenizer does.
            before = len(tokenizer(row["question"])["input_ids"])
            ids = tokenizer(row["question"] + choice)["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            totals.append(sum(float(log_p[at - 1, ids[at]]) for at in range(before, len(ids))))
        hits += totals.index(max(totals)) == row["answer"]
    assert (score.name, score.value, score.count) == ("choices acc", hits / 4, 4)
    assert score.higher_is_better
    assert tokenizer.pad_token is None


def test_harness_refuses(tmp_path: Path) -> None:
    write_task(tmp_path)
    with pytest.raises(ConfigurationError, match="no task other; known: choices"):
        HarnessTasks(["choices", "other"], tmp_path)
    with pytest.raises(ConfigurationError, match="no folder of task files"):
        HarnessTasks(["choices"], tmp_path / "none")


def test_harness_that_is_missing_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from hf_compress.evaluation import HarnessTasks\n"
        f"HarnessTasks(['choices'], {str(tmp_path)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ConfigurationError" in done.stderr
    assert "pip install 'hf_compress[lm-eval]'" in done.stderr
