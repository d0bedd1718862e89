"""Prompt sets and prompt files, good and bad."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations

import pytest

from keelweight.errors import UserError
from keelweight.inputs.prompts import load_prompts, spread

SETS = ("harmful", "harmless", "borderline")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


@pytest.mark.parametrize(("name", "least"), [("harmful", 240), ("harmless", 240), ("borderline", 160)])
def test_built_in_sets_are_large_and_split(name, least):
    everything = load_prompts(f"builtin:{name}")
    train, held_out = (load_prompts(f"builtin:{name}", split=split) for split in ("train", "eval"))
    assert len(everything) >= least
    assert len(train) + len(held_out) == len(everything)
    assert len(held_out) >= 64
    assert len({p.prompt for p in everything}) == len(everything)


def test_harmful_prompts_have_twelve_categories_and_refusals():
    prompts = load_prompts("builtin:harmful")
    categories = Counter(p.category for p in prompts)
    assert len(categories) >= 12
    assert min(categories.values()) >= 20
    assert all(4 <= len(words(p.response)) <= 60 for p in prompts)


@pytest.mark.parametrize("name", SETS)
def test_train_and_eval_share_no_template(name):
    """No common opening of three words, and no pair of prompts with half of their words in common."""
    train, held_out = (load_prompts(f"builtin:{name}", split=split) for split in ("train", "eval"))
    openings = [{tuple(words(p.prompt)[:3]) for p in part} for part in (train, held_out)]
    assert not openings[0] & openings[1]
    for one, other in combinations([*train, *held_out], 2):
        a, b = set(words(one.prompt)), set(words(other.prompt))
        assert len(a & b) / len(a | b) < 0.5, (one.prompt, other.prompt)


def test_a_limit_is_spread_over_categories_and_seeded():
    chosen = load_prompts("builtin:harmful", limit=24, seed=1)
    assert set(Counter(p.category for p in chosen).values()) == {2}
    assert (
        chosen == load_prompts("builtin:harmful", limit=24, seed=1) != load_prompts("builtin:harmful", limit=24, seed=2)
    )
    assert len(spread(chosen, 1000)) == 24


def test_the_three_kinds_of_file_read_alike(tmp_path):
    rows = [("Why?", "Because."), ("How, then?", 'Like "this".\nAnd that.')]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    (tmp_path / "p.csv").write_text('question,answer\nWhy?,Because.\n"How, then?","Like ""this"".\nAnd that."\n')
    (tmp_path / "p.txt").write_text("Why?\n\nHow, then?\n")
    fields = {"prompt": "question", "response": "answer"}
    for kind in ("jsonl", "csv"):
        found = load_prompts(str(tmp_path / f"p.{kind}"), fields=fields)
        assert [(p.prompt, p.response) for p in found] == rows
    assert [p.prompt for p in load_prompts(str(tmp_path / "p.txt"))] == ["Why?", "How, then?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "no prompts"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "a.jsonl line 2: not JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n[1]\n', "line 2: expected a JSON object, found list"),
        ("a.jsonl", b'{"text": "x"}\n', "line 1: expected text in the field 'prompt', the row has: text"),
        ("a.jsonl", b'{"prompt": 3}\n', "line 1: expected text in the field 'prompt'"),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"prompt": "caf\xe9"}\n', "a.jsonl line 3: not UTF-8 .byte 0xe9"),
        ("a.jsonl", b'{"prompt": "x", "id": 1}\n{"prompt": "y", "id": 1}', "line 2: the id '1' occurs twice"),
        ("a.csv", b"prompt,response\nx,y,z\n", "a.csv line 2: expected 2 columns"),
        ("a.csv", b'prompt\n"x\n', "malformed CSV"),
        ("a.xml", b"<x/>", "unknown kind of file"),
    ],
)
def test_bad_files_are_answered_with_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_prompts(str(path))


def test_unknown_sources_are_errors(tmp_path):
    with pytest.raises(UserError, match="no such built-in set"):
        load_prompts("builtin:evil")
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="of split 'dev'"):
        load_prompts("builtin:harmful", split="dev")
    with pytest.raises(UserError, match="no field 'question'"):
        load_prompts("builtin:harmful", fields={"question": "q"})


def test_hub_sets_need_their_extra():
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'keelweight\[hub\]'"):
            load_prompts("hub:some/set")
