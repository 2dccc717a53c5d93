"""Token windows: what is cut from which text, and every refusal."""

from __future__ import annotations

import json
import lzma
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from outlierq.calibrate.text import embedded
from outlierq.calibrate.text.embedded import MIX, documents, embedded_text
from outlierq.calibrate.text.windows import TextSource, shares, token_windows
from outlierq.core.errors import StatsError

DATA = Path(embedded.__file__).parents[2] / "data"
WORDS = 300
EOS, BOS, UNKNOWN = WORDS, WORDS + 1, WORDS + 2
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def tokenizer(*, bos: bool = False, chat: str | None = None) -> PreTrainedTokenizerFast:
    """One token a word: "w17" is 17; "user" and all others are unknown."""
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<eos>": EOS, "<bos>": BOS, "<unk>": UNKNOWN}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", chat_template=chat
    )


class Spelling:
    """One token a sign: its code point. Documents end with 0."""

    eos_token_id, all_special_ids = 0, (0,)

    def __call__(self, texts, **settings):
        single = isinstance(texts, str)
        ids = [[ord(sign) for sign in text] for text in ([texts] if single else texts)]
        return {"input_ids": ids[0] if single else ids}


def words(*numbers: int) -> str:
    return " ".join(f"w{i}" for i in numbers)


@pytest.fixture
def counting(tmp_path) -> str:
    """A text file with the words 0 to 299."""
    path = tmp_path / "counting.txt"
    path.write_text(words(*range(WORDS)))
    return str(path)


def jsonl(tmp_path, rows, name: str = "rows.jsonl") -> str:
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def windows(sources, *, samples=3, sequence_length=5, seed=None, **settings):
    return token_windows(
        settings.pop("tokenizer", None) or tokenizer(),
        sources,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        **settings,
    )


def test_without_a_seed_the_first_windows_are_taken_in_order(counting):
    found = windows([{"path": counting}])
    assert torch.equal(found.ids, torch.arange(15).view(3, 5)) and found.ids.dtype == torch.long
    assert found.description == "3 x 5 tokens of text: counting.txt"


def test_with_a_seed_windows_are_chosen_from_the_whole_file(counting):
    found = windows([{"path": counting}], samples=20, seed=1)
    starts = found.ids[:, 0].tolist()
    assert all(start % 5 == 0 for start in starts) and len(set(starts)) == 20 and max(starts) > 200
    assert torch.equal(found.ids, torch.tensor([list(range(s, s + 5)) for s in starts]))
    assert torch.equal(found.ids, windows([{"path": counting}], samples=20, seed=1).ids)
    assert not torch.equal(found.ids, windows([{"path": counting}], samples=20, seed=2).ids)


def test_choosing_leaves_the_global_random_state_alone(counting):
    state = torch.random.get_rng_state()
    windows([{"path": counting}], seed=1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_fingerprint_tells_texts_and_settings_apart(counting):
    same = {windows([{"path": counting}]).fingerprint for _ in range(2)}
    others = {
        windows([{"path": counting}], seed=seed, samples=n).fingerprint for seed, n in [(0, 3), (1, 3), (None, 4)]
    }
    assert len(same) == 1 and len(same | others) == 4


def test_each_window_starts_with_bos_where_the_tokenizer_adds_it(counting):
    found = windows([{"path": counting}], tokenizer=tokenizer(bos=True)).ids
    assert found.tolist() == [[BOS, 0, 1, 2, 3], [BOS, 4, 5, 6, 7], [BOS, 8, 9, 10, 11]]


def test_rows_are_joined_with_eos_and_empty_ones_left_out(tmp_path):
    rows = [{"text": words(1, 2)}, {"text": ""}, {"text": words(3)}, {"text": None}, {"text": words(4, 5, 6, 7)}]
    found = windows([{"path": jsonl(tmp_path, rows)}], samples=3, sequence_length=3)
    assert found.ids.tolist() == [[1, 2, EOS], [3, EOS, 4], [5, 6, 7]]


def test_parquet_and_jsonl_give_the_same_windows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    bodies = [words(i, i + 1, i + 2) for i in range(40)]
    pyarrow.parquet.write_table(pyarrow.table({"body": bodies, "n": list(range(40))}), tmp_path / "rows.parquet")
    lines = jsonl(tmp_path, [{"body": body} for body in bodies])
    one = windows([{"path": str(tmp_path / "rows.parquet"), "column": "body"}], seed=3)
    two = windows([{"path": lines, "column": "body"}], seed=3)
    assert torch.equal(one.ids, two.ids)


def test_a_large_file_of_rows_is_not_read_to_its_end(tmp_path):
    path = jsonl(tmp_path, [{"text": words(1, 2, 3, 4)}] * 200)
    with open(path, "a") as file:
        file.write("\nnot json")
    assert windows([{"path": path}], samples=2, seed=0).ids.shape == (2, 5)


def test_a_mix_is_shared_out_by_weight(tmp_path, counting):
    path = jsonl(tmp_path, [{"text": words(299)}] * 99)
    found = windows([{"path": counting, "weight": 3}, TextSource(path=path, weight=1)], samples=6, sequence_length=4)
    from_rows = (found.ids == 299).any(1)
    assert from_rows.tolist() == [False] * 5 + [
        True
    ]  # 4.5 and 1.5 samples: the first of equal remainders gets the rest
    assert shares(10, [1, 1, 1]) == [4, 3, 3] and shares(3, [0.2, 0.5, 0.3]) == [1, 1, 1]
    assert shares(7, [1]) == [7] and sum(shares(128, [0.1, 0.7, 0.2])) == 128


def test_the_python_language_reference_has_two_parts_without_common_topics():
    from pydoc_data.topics import topics

    parts = {part: embedded_text(part, "embedded") for part in ("calibration", "evaluation")}
    inside = {part: {name for name in topics if topics[name] in text} for part, text in parts.items()}
    assert not inside["calibration"] & inside["evaluation"]
    assert inside["calibration"] | inside["evaluation"] == set(topics)
    assert 0.1 < len(parts["evaluation"]) / sum(map(len, parts.values())) < 0.5
    for name in ("mix", "embedded"):
        with pytest.raises(StatsError, match="not 'test'"):
            embedded_text("test", name)


@pytest.fixture(scope="module")
def mix() -> list[dict[str, str]]:
    """The rows of the mix: part, domain, source, work and text."""
    return [json.loads(line) for line in lzma.open(DATA / "text.jsonl.xz", "rt", encoding="utf-8")]


def test_the_parts_of_the_mix_share_no_work_and_no_translation_of_one(mix):
    works = {part: {row["work"] for row in mix if row["part"] == part} for part in ("calibration", "evaluation")}
    assert min(map(len, works.values())) > 80 and not works["calibration"] & works["evaluation"]
    assert len({row["text"] for row in mix}) == len(mix)
    for part in works:
        assert documents(part) == tuple(row["text"] for row in mix if row["part"] == part)
    assert 0.05 < len(embedded_text("evaluation")) / len(embedded_text("calibration")) < 0.2


def test_every_stretch_of_the_mix_holds_each_domain_in_its_share(mix):
    rows = [row for row in mix if row["part"] == "calibration"]
    whole = _shares_of_domains(rows)
    assert set(whole) == {"encyclopedia", "prose", "documentation", "code", "mathematics", "chat", "languages"}
    assert min(whole.values()) > 0.03 and max(whole.values()) < 0.35
    for start in range(0, len(rows) - 100, 100):
        here = _shares_of_domains(rows[start : start + 100])
        assert all(0.5 < here[domain] / share < 1.7 for domain, share in whole.items()), (start, here)


def _shares_of_domains(rows: list[dict[str, str]]) -> dict[str, float]:
    """The share of each domain in the characters of the rows."""
    characters = Counter()
    for row in rows:
        characters[row["domain"]] += len(row["text"])
    return {domain: count / characters.total() for domain, count in characters.items()}


def test_every_source_of_the_mix_is_listed_with_its_licence_in_the_wheel(mix):
    listed = (DATA / "text.md").read_text("utf-8")
    for source in {row["source"] for row in mix}:
        assert f"| {source} |" in listed, source
    titles = {row["work"] for row in mix if row["source"] == "Wikipedia"}
    assert len(titles) > 50 and all(title in listed for title in titles)


@pytest.mark.parametrize(
    ("word", "name"), [("mix", "outlierq's mix of texts"), ("embedded", "Python language reference")]
)
def test_a_text_that_is_always_at_hand_is_a_source_by_its_word(word, name):
    settings = {"tokenizer": Spelling(), "sequence_length": 64}
    calibration = windows(word, **settings)
    assert f"{name} (calibration part)" in calibration.description
    assert torch.equal(calibration.ids, windows([word], **settings).ids)
    held_out = windows([{"path": word, "split": "evaluation"}], **settings)
    assert calibration.fingerprint != held_out.fingerprint


def test_a_seed_says_where_in_the_mix_to_begin():
    settings = {"tokenizer": Spelling(), "sequence_length": 2048, "samples": 4}
    first, again, other = (windows(MIX, seed=seed, **settings).ids for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    begun = "".join(map(chr, first.flatten().tolist())).split("\0")
    there = documents("calibration").index(begun[0])
    assert begun[1] == documents("calibration")[there + 1] and there > 0
    unseeded = windows(MIX, **settings).ids.flatten().tolist()
    assert "".join(map(chr, unseeded)).startswith(documents("calibration")[0])


def test_messages_are_rendered_by_the_chat_template(tmp_path):
    rows = [{"messages": [{"role": "w1", "content": "w2"}, {"role": "w3", "content": "w4 w5"}]}] * 4
    path = jsonl(tmp_path, rows)
    found = windows([{"path": path}], tokenizer=tokenizer(chat=CHAT), chat_template=True)
    assert found.ids.tolist() == [[1, 2, 3, 4, 5]] * 3
    assert found.description == "3 x 5 tokens of chats: rows.jsonl"


def test_plain_text_is_a_user_turn_in_the_chat_template(tmp_path):
    path = tmp_path / "text.md"
    path.write_text("w1 w2\n\nw3 w4 w5\n\nw6 w7 w8 w9")
    chat = tokenizer(chat=CHAT)
    found = windows([{"path": str(path)}], samples=2, sequence_length=6, tokenizer=chat, chat_template=True)
    assert found.ids.tolist() == [[UNKNOWN, 1, 2, UNKNOWN, 3, 4], [5, UNKNOWN, 6, 7, 8, 9]]


def refused(message: str, sources, **settings) -> StatsError:
    with pytest.raises(StatsError, match=message) as caught:
        windows(sources, **settings)
    return caught.value


def test_too_short_a_text_is_refused_with_both_numbers(counting):
    error = refused("has 300 tokens; 100 samples of 5 tokens need 500", [{"path": counting}], samples=100)
    assert "samples: 60" in error.hint and error.where == "calibrate on counting.txt"
    assert refused("has 300 tokens", [{"path": counting}], sequence_length=301).hint == "use more text"


def test_a_missing_column_is_refused_with_the_columns_there_are(tmp_path):
    path = jsonl(tmp_path, [{"txt": "w1", "label": 1}])
    error = refused(r"rows.jsonl has no column 'text'; it has txt, label", [{"path": path}])
    assert error.hint == "did you mean txt?"
    error = refused("no column 'abc'", [{"path": path, "column": "abc"}])
    assert error.hint == "set `column`"


def test_a_missing_parquet_column_is_refused_with_the_columns_there_are(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"content": ["w1"]}), tmp_path / "rows.parquet")
    refused("has no column 'text'; it has content", [{"path": str(tmp_path / "rows.parquet")}])


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl", "absent.parquet"])
def test_a_file_that_is_not_there_is_refused(tmp_path, name):
    assert refused(f"cannot read .*{name}: No such file", [{"path": str(tmp_path / name)}]).hint


@pytest.mark.parametrize("name", ["binary.txt", "binary.jsonl"])
def test_a_file_that_is_not_text_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"w1 \xff\xfe")
    refused(f"{name} is not UTF-8 text: byte 3", [{"path": str(tmp_path / name)}])


def test_a_folder_is_refused(tmp_path):
    refused("it is a folder, not a file", [{"path": str(tmp_path)}])


def test_files_with_broken_rows_are_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "w1"}\n{"text": ')
    refused("line 2 of bad.jsonl is not JSON", [{"path": str(tmp_path / "bad.jsonl")}])
    refused("line 1 of rows.jsonl is a list, not an object", [{"path": jsonl(tmp_path, [["w1"]])}])
    refused("row 0 of rows.jsonl holds int where text", [{"path": jsonl(tmp_path, [{"text": 5}])}])
    (tmp_path / "bad.parquet").write_text("w1")
    refused("bad.parquet is not a Parquet file", [{"path": str(tmp_path / "bad.parquet")}])


def test_a_data_set_without_a_network_is_refused(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    error = refused("cannot stream the data set some/set: no route", [{"dataset": "some/set"}])
    assert "text: mix" in error.hint and error.where == "calibrate on some/set"


def test_a_data_set_is_streamed_with_its_config_and_split(monkeypatch):
    import datasets

    def load(name, config, *, split, streaming):
        assert (name, config, split, streaming) == ("some/set", "small", "validation", True)
        return datasets.IterableDataset.from_generator(lambda: ({"text": words(i, i)} for i in range(50)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = {"dataset": "some/set", "config": "small", "split": "validation"}
    found = windows([source], sequence_length=3)
    assert found.ids.tolist() == [[0, 0, EOS], [1, 1, EOS], [2, 2, EOS]]
    assert found.description.endswith("some/set small validation")


def test_sources_that_make_no_sense_are_refused(counting):
    refused("either `path` or `dataset`", [{"column": "text"}])
    refused("either `path` or `dataset`", [{"path": counting, "dataset": "some/set"}])
    refused("weight of counting.txt is 0", [{"path": counting, "weight": 0}])
    assert refused("unknown key 'colum'", [{"path": counting, "colum": "text"}]).hint == "did you mean column?"
    refused("got 0, 3 and 5", [])
    refused("got 1, 3 and 1", [{"path": counting}], sequence_length=1)


def test_chats_without_a_template_or_with_bad_messages_are_refused(tmp_path, counting):
    refused("the tokenizer has no chat template", [{"path": counting}], chat_template=True)
    strict = tokenizer(chat="{{ raise_exception('roles must alternate') }}")
    rows = jsonl(tmp_path, [{"messages": [{"role": "user", "content": "w1"}]}])
    refused("messages of row 0 of rows.jsonl: roles must", [{"path": rows}], tokenizer=strict, chat_template=True)
    refused("has no column 'text'; it has messages", [{"path": rows}])


SHAREGPT = [{"from": "human", "value": "w2"}, {"from": "gpt", "value": "w4 w5"}]
ROLES = "{% for m in messages %}{{ {'user': 'w1', 'assistant': 'w3'}[m.role] }} {{ m.content }} {% endfor %}"


def test_chats_of_sharegpt_are_rendered_from_files_and_parquet_alike(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"conversations": SHAREGPT}] * 4), tmp_path / "a.parquet")
    for path in (jsonl(tmp_path, [{"conversations": SHAREGPT}] * 4), str(tmp_path / "a.parquet")):
        for column in ({}, {"column": "conversations"}):
            found = windows([{"path": path, **column}], tokenizer=tokenizer(chat=ROLES), chat_template=True)
            assert found.ids.tolist() == [[1, 2, 3, 4, 5]] * 3


def test_pairs_of_a_data_set_are_rendered(monkeypatch):
    import datasets

    rows = [{"question": "w2", "answer": "w4 w5"}] * 4
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(lambda: rows)
    )
    found = windows([{"dataset": "some/set"}], tokenizer=tokenizer(chat=ROLES), chat_template=True)
    assert found.ids.tolist() == [[1, 2, 3, 4, 5]] * 3


def test_rows_without_text_are_skipped_and_said(tmp_path):
    good = {"messages": [{"role": "w1", "content": "w2 w3 w4 w5"}]}
    path = jsonl(tmp_path, [{"messages": None}, {"messages": []}, good, good, good])
    found = windows([{"path": path}], tokenizer=tokenizer(chat=CHAT), chat_template=True)
    assert found.ids.tolist() == [[1, 2, 3, 4, 5]] * 3
    assert found.notes == ("rows.jsonl: left out: rows without text (2)",)
    plain = windows([{"path": jsonl(tmp_path, [{"text": ""}, {"text": words(*range(40))}])}])
    assert plain.notes == ("rows.jsonl: left out: rows without text (1)",)


def test_chats_without_the_chat_template_are_refused_with_the_way_out(tmp_path):
    path = jsonl(tmp_path, [{"conversations": SHAREGPT}])
    assert "chat_template: true" in refused("no column 'text'; it has conversations", [{"path": path}]).hint
    path = jsonl(tmp_path, [{"body": "w1"}])
    error = refused("no column 'text'", [{"path": path}], tokenizer=tokenizer(chat=CHAT), chat_template=True)
    assert "prompt and completion" in error.hint


def text_of(tmp_path, numbers) -> list[dict[str, str]]:
    (tmp_path / "text.txt").write_text(words(*numbers))
    return [{"path": str(tmp_path / "text.txt")}]


def test_text_of_hardly_any_different_tokens_is_refused(tmp_path):
    for period in (1, 2, 3):
        source = text_of(tmp_path, [i % period for i in range(200)])
        refused("3 of 3 windows of 40 tokens hold less than 4 different tokens", source, sequence_length=40)
    assert windows(text_of(tmp_path, [i % 4 for i in range(200)]), sequence_length=40).notes == ()


def test_text_of_nothing_but_special_tokens_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("<eos> <bos> other words " * 60)
    refused("3 of 3 windows of 40", [{"path": str(tmp_path / "text.txt")}], sequence_length=40)


def test_some_windows_of_one_token_are_noted(tmp_path):
    source = text_of(tmp_path, [0] * 40 + list(range(120)))
    (said,) = windows(source, samples=4, sequence_length=40).notes
    assert said.startswith("text.txt: 1 of 4 windows of 40 tokens hold less than 4 different")


def test_a_text_of_few_different_tokens_is_noted(tmp_path):
    source = text_of(tmp_path, [i % 20 for i in range(1200)])
    assert windows(source, samples=30, sequence_length=40).notes == (
        "text.txt: there are only 20 different tokens among 1,200",
    )
