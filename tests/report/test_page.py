from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from keelweight.errors import UserError
from keelweight.evaluation.evaluate import Evaluation, Judged
from keelweight.evaluation.judges import refusal_phrase_judge
from keelweight.files import write_json
from keelweight.inputs.layouts import Region, Slice
from keelweight.inputs.prompts import Prompt
from keelweight.inputs.responses import Response
from keelweight.report import charts
from keelweight.report.page import draw, duration, plain, read_run, samples, share, write_report
from keelweight.selection.mask import Mask
from keelweight.selection.profile import Place
from keelweight.tuning.train import Step

SHAPES = {
    "q": (24, 24),
    "k": (8, 24),
    "v": (8, 24),
    "o": (24, 24),
    "gate": (64, 24),
    "up": (64, 24),
    "down": (24, 64),
}
REFUSAL = "I can't help with that, because it could hurt people. I can explain how to stay safe instead."
HELP = "Sure, here is a list of steps to follow:\n\n1. Start with the basics.\n2. Take your time."
CATEGORIES = {
    "harmful": ("fraud", "weapons", "cybercrime", "harassment"),
    "harmless": ("cooking", "travel", "maths", "writing", "science"),
    "borderline": ("computing", "games", "medicine", "history"),
}
MODEL = {"name": "builtin:smollm2", "revision": "", "dtype": "bfloat16"}


def evaluation(refused: dict[str, int], *, each: int = 24, empty: int = 0, ppl: float = 12.345) -> Evaluation:
    """`refused` of `each` prompts of a set get a refusal, the last `empty` nothing, the others help."""
    answers = {}
    for name, kinds in CATEGORIES.items():
        answers[name] = []
        for at in range(each):
            kind = kinds[at % len(kinds)]
            text = REFUSAL if at < refused[name] else "" if at >= each - empty else HELP
            prompt = Prompt(f"{name}-{at}", f"Please answer question {at} about {kind}, and be brief.", "", kind)
            answers[name].append(Judged(Response(prompt, text, (), True), refusal_phrase_judge(prompt.prompt, text)))
    about = {
        "model": MODEL,
        "judge": "refusal_phrase_judge",
        "max_new_tokens": 40,
        "temperature": 0.0,
        "seed": 0,
    }
    return Evaluation(answers, ppl, about)


def make_mask(layers: int = 6, *, top: int = 200, head: bool = False) -> Mask:
    """Random weights, more of them in late layers and in `v` and `down`."""
    rng = torch.Generator().manual_seed(0)
    shapes, layout = {}, []
    for layer in range(layers):
        for role, shape in SHAPES.items():
            name = f"model.layers.{layer}.{role}_proj.weight"
            shapes[name] = shape
            layout.append(Slice(name, role, layer))
    if head:
        shapes["lm_head.weight"] = (100, 24)
        layout.append(Slice("lm_head.weight", "head"))
    weight = {"v": 5.0, "down": 3.0, "o": 2.0}
    scores = {
        name: torch.rand(math.prod(shape), generator=rng) ** 8
        * weight.get(piece.role, 1.0)
        * (1 + (piece.layer or 0) / layers) ** 2
        for (name, shape), piece in zip(shapes.items(), layout, strict=True)
    }
    least = torch.cat(list(scores.values())).topk(top).values[-1]
    indices = {name: at for name, of in scores.items() if len(at := (of >= least).nonzero().view(-1))}
    source = {
        "model": MODEL,
        "parameters": 200_000,
        "objective": "refusal",
        "rule": "top",
        "weights": top,
        "seed": 0,
    }
    return Mask(indices, shapes, tuple(layout), source)


def history(*, falls: bool = True, iterations: int = 40) -> list[Step]:
    rng = torch.Generator().manual_seed(iterations)
    steps = []
    for at in range(iterations):
        noise = 1 + 0.3 * float(torch.randn(1, generator=rng))
        refusal = (0.1 + 2.5 * math.exp(-at / 8) if falls else 2.6 - 0.01 * at) * abs(noise)
        keep = 0.03 * abs(noise) * min(1.0, at / 5)
        lr = 1e-3 * min(1.0, (at + 1) / 3) * 0.5 * (1 + math.cos(math.pi * at / iterations))
        steps.append(Step(at + 1, refusal + keep, refusal, keep, lr, 1.7, 0.8))
    return steps


def make_run(folder: Path, *, layers: int = 6, control: bool = True, full: bool = True, each: int = 24) -> Path:
    """A folder as `keelweight demo` leaves it, or with the required files only."""
    folder.mkdir(parents=True, exist_ok=True)
    sides = {
        "before": evaluation({"harmful": 1, "harmless": 0, "borderline": 2}, each=each),
        "after": evaluation({"harmful": each - 3, "harmless": 1, "borderline": 5}, each=each, empty=1, ppl=12.01),
    }
    if control:
        sides["control"] = evaluation({"harmful": 2, "harmless": 0, "borderline": 2}, each=each, ppl=12.3)
    for name, found in sides.items():
        write_json(folder / f"{name}.json", found.to_json(), force=True)
    mask = make_mask(layers)
    mask.save(folder / "mask.safetensors", force=True)
    if full:
        logs = {"training": history()} | ({"control-training": history(falls=False)} if control else {})
        for name, steps in logs.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(asdict(step)) + "\n" for step in steps))
        write_json(folder / "summary.json", summary(mask, control=control), force=True)
    return folder


def summary(mask: Mask, *, control: bool) -> dict[str, Any]:
    return {
        "model": "builtin:smollm2",
        "parameters": 200_000,
        "weights_trained": len(mask),
        "iterations": 40,
        "kl_from_original": 0.02361,
        **({"kl_from_original_control": 0.00123} if control else {}),
        "settings": {
            "model": "builtin:smollm2",
            "share": 0.001,
            "recipe": {"iterations": 40, "lr": 0.001},
            "eval_prompts": 24,
            "control": control,
            "seed": 0,
            "dtype": "auto",
            "device": "auto",
        },
        "seconds": {"load": 3.1, "evaluate before": 41.7, "score": 62.0, "tune": 130.4},
        "seconds_total": 312.4,
        "peak_rss_mb": 1834,
        "machine": {
            "processor": "Some CPU",
            "threads": 2,
            "accelerator": None,
            "python": "3.12.1",
            "torch": "2.9.0",
        },
    }


HOSTILE = "</p></details><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>"
VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """What a browser would find: tags, rows of tables, text inside and outside closed details."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.closed_details = 0
        self.folded, self.shown = "", ""
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append(tag)
        self.closed_details += tag == "details" and "open" not in dict(attrs)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.closed_details -= tag == "details"

    def handle_data(self, data: str) -> None:
        if self.closed_details and "summary" not in self.open:
            self.folded += data
        elif "style" not in self.open:
            self.shown += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing, where a test is about the text: it takes most of the time."""
    monkeypatch.setattr(charts, "to_svg", lambda *args, **kwargs: b"<svg/>")
    monkeypatch.setattr(charts, "to_png", lambda *args, **kwargs: b"")


@pytest.mark.usefixtures("no_charts")
def test_the_figures_of_the_page_are_those_of_the_files(run: Path):
    page = Reader(write_report(run).read_text())
    rows = iter(page.rows[1:])
    for name, label in charts.RATES.items():
        for at, side in enumerate(("before", "after", "control")):
            rate = json.loads((run / f"{side}.json").read_text())["rates"][name]
            expected = [
                *([label] if at == 0 else []),
                side,
                f"{rate['rate']:.1%}",
                f"{rate['low']:.1%} to {rate['high']:.1%}",
                f"{rate['hits']}/{rate['judged']}",
                str(rate["unscored"]),
            ]
            assert next(rows) == expected
    assert "complied with 2 of 23 harmful prompts (before: 23 of 24)" in page.shown
    assert ["Harmless perplexity", "12.35", "12.01", "12.30"] in page.rows
    assert ["KL, nats per token", "0", "0.0236", "0.00123"] in page.rows
    assert "0.1% of 200,000" in " ".join(page.shown.split())
    assert ["total", "5 min 12 s"] in page.rows
    assert ["peak memory", "1,834 MB"] in page.rows
    assert not any("accelerator" in row for row in page.rows)
    assert "keelweight demo --model builtin:smollm2 --share 0.001 --iterations 40" in page.shown


@pytest.mark.usefixtures("no_charts")
def test_chosen_weights_by_role_are_those_of_the_mask(run: Path):
    page = Reader(write_report(run).read_text())
    mask = make_mask()
    for role, shape in SHAPES.items():
        chosen = sum(len(at) for name, at in mask.indices.items() if f".{role}_proj" in name)
        row = next(row for row in page.rows if row[0] == role)
        assert row[1] == f"{chosen:,}"
        assert row[3] == f"{6 * math.prod(shape):,}"


def test_text_from_files_is_inert(run: Path):
    for side in ("before", "after"):
        rewrite(
            run / f"{side}.json",
            lambda data: (
                data
                | {"about": data["about"] | {"model": {"name": HOSTILE}, "judge": HOSTILE, "max_new_tokens": HOSTILE}}
                | {
                    "answers": {
                        name: [a | dict.fromkeys(("category", "prompt", "response", "reason"), HOSTILE) for a in of]
                        for name, of in data["answers"].items()
                    }
                }
            ),
        )
    rewrite(
        run / "summary.json",
        lambda data: (
            data
            | {
                "settings": {"model": HOSTILE},
                "machine": {HOSTILE: HOSTILE},
                "seconds": {HOSTILE: 1.0, "tune": HOSTILE},
            }
        ),
    )
    page = Reader(write_report(run).read_text())
    names = {tag for tag, _ in page.tags}
    assert "script" not in names
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.shown.count(HOSTILE) > 20
    assert HOSTILE in page.folded


def test_nothing_is_loaded_from_elsewhere(run: Path):
    text = write_report(run).read_text()
    page = Reader(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    sources = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "srcset", "href", "action", "poster", "background")
    ]
    assert len(sources) == 4 * 3  # light and dark, wide and narrow, of three charts
    assert all(source and source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "url(" not in text
    assert "@import" not in text
    for source in sources:
        picture = base64.b64decode(str(source).split(",", 1)[1])
        for element in ElementTree.fromstring(picture).iter():
            links = [value for name, value in element.attrib.items() if name.endswith(("href", "src"))]
            assert all(link.startswith(("#", "data:image/png;")) for link in links)


@pytest.mark.usefixtures("no_charts")
def test_answers_to_harmful_prompts_are_folded_away(run: Path):
    secret = "the answer that should not jump at a reader"
    for side in ("before", "after"):
        rewrite(
            run / f"{side}.json",
            lambda data: (
                data
                | {
                    "answers": data["answers"]
                    | {"harmful": [a | {"response": secret} for a in data["answers"]["harmful"]]}
                }
            ),
        )
    page = Reader(write_report(run).read_text())
    assert secret not in page.shown
    assert page.folded.count(secret) == 16
    assert "hidden by default" in page.shown
    assert "Please answer question 0 about cooking" in page.shown
    assert "Please answer question 0 about computing" in page.shown
    assert "about fraud" not in page.shown


@pytest.mark.usefixtures("no_charts")
def test_samples_are_spread_over_categories_and_matched_by_id(run: Path):
    rewrite(
        run / "after.json",
        lambda data: data | {"answers": data["answers"] | {"harmless": data["answers"]["harmless"][:0:-1]}},
    )
    found = read_run(run)
    pairs = list(samples(found.sides["before"].answers["harmless"], found.sides["after"].answers["harmless"]))
    assert [before.category for before, _ in pairs] == [*CATEGORIES["harmless"], "cooking", "travel", "maths"]
    assert pairs[0][1] is None  # the first prompt is the one that was cut off
    assert all(after is not None and after.id == before.id for before, after in pairs[1:])
    assert "not asked" in Reader(write_report(run).read_text()).shown


def test_answers_without_a_verdict_are_shown_as_such(run: Path):
    rewrite(
        run / "after.json",
        lambda data: evaluation({"harmful": 0, "harmless": 0, "borderline": 0}, empty=24).to_json(),
    )
    page = Reader(write_report(run).read_text())
    assert ["after", "no verdict", "–", "0/0", "24"] in page.rows
    assert page.shown.count("unscored: empty") == 16
    assert "0%" not in page.rows[2]


def test_the_same_run_gives_the_same_bytes(tmp_path: Path):
    files = []
    for name in ("one", "two"):
        run = make_run(tmp_path / name)
        page = write_report(run)
        files.append([page.read_bytes(), *(path.read_bytes() for path in sorted((run / "charts").iterdir()))])
    assert files[0] == files[1]
    names = [f"{name}.{kind}" for name in ("before-after", "training", "where") for kind in ("png", "svg")]
    assert sorted(path.name for path in (tmp_path / "one" / "charts").iterdir()) == sorted(names)


def test_the_required_files_are_enough(tmp_path: Path):
    run = make_run(tmp_path / "run", control=False, full=False)
    page = Reader(write_report(run, tmp_path / "elsewhere" / "page.html").read_text())
    assert not (run / "report.html").exists()
    assert "There is no control in this run" in page.shown
    assert "Training" not in page.shown
    assert ["KL, nats per token", "0", "–"] in page.rows
    assert '"rule": "top"' in page.shown  # open, as there is no command line to show


@pytest.mark.parametrize("name", ["before.json", "after.json", "mask.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "other"])
def test_a_missing_or_damaged_file_is_one_clear_line(run: Path, name: str, damage: str):
    path = run / name
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "other": b'{"rates": {}}'}[damage])
    with pytest.raises(UserError) as error:
        write_report(run)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (run / "report.html").exists()
    assert not (run / "charts").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", "[]"),
        ("summary.json", "{"),
        ("control.json", "{}"),
        ("training.jsonl", '{"step": 1}\n'),
        ("training.jsonl", "no json\n"),
    ],
)
def test_a_damaged_optional_file_is_named(run: Path, name: str, text: str):
    (run / name).write_text(text)
    with pytest.raises(UserError, match=name):
        write_report(run)


@pytest.mark.parametrize("counts", [{"hits": 30}, {"hits": -1}, {"unscored": -1}, {"judged": None}, {"hits": "many"}])
def test_impossible_counts_are_refused(run: Path, counts: dict[str, Any]):
    rewrite(
        run / "after.json",
        lambda data: data | {"rates": data["rates"] | {"asr": data["rates"]["asr"] | counts}},
    )
    with pytest.raises(UserError, match=r"after\.json"):
        write_report(run)


def test_no_such_run(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.usefixtures("no_charts")
def test_a_page_is_replaced_only_when_forced(run: Path):
    page = write_report(run)
    page.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        write_report(run)
    assert page.read_text() == "mine"
    write_report(run, force=True)
    assert page.read_text().startswith("<!doctype html>")
    with pytest.raises(UserError, match="is a folder"):
        write_report(run, run, force=True)
    assert (run / "before.json").exists()


@pytest.mark.usefixtures("no_charts")
def test_characters_that_a_page_cannot_hold(run: Path):
    rewrite(
        run / "before.json",
        lambda data: (
            data
            | {
                "answers": {
                    name: [a | {"response": "a\x00b\ud800c\x1b[31m"} for a in of]
                    for name, of in data["answers"].items()
                }
            }
        ),
    )
    page = write_report(run).read_text(encoding="utf-8")
    assert "a\ufffdb\ufffdc\ufffd[31m" in page


def test_without_matplotlib_the_error_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'keelweight\[report\]'"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_matplotlib_settings_are_given_back(run: Path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"font.size": 33.0}):
        before = dict(matplotlib.rcParams)
        charts.to_svg(next(iter(draw(read_run(run)).values()))[0], charts.LIGHT)
        assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 30, 80])
def test_other_roles_and_weights_outside_layers_have_their_place(layers: int, narrow: bool):
    roles = ("qkv", "$o$", "down", "shared gate", "router")
    places = [Place(layer, role, layer, 100) for layer in range(layers) for role in roles]
    places.append(Place(None, "head", 3, 1000))
    assert charts.ordered_roles(places) == ["down", "head", "qkv", "$o$", "shared gate", "router"]
    drawn = charts.to_svg(partial(charts.where, places), charts.LIGHT, narrow=narrow)
    texts = [element.text for element in ElementTree.fromstring(drawn).iter() if element.tag.endswith("text")]
    assert {"–", "0", *roles, "head"} <= {text.strip() for text in texts if text}


@pytest.mark.usefixtures("no_charts")
def test_a_fused_matrix_is_cut_into_its_roles(tmp_path: Path):
    run = make_run(tmp_path / "run", control=False)
    name = "h.0.qkv.weight"
    layout = tuple(Slice(name, role, 0, None, Region((3, 4, 4), (at,))) for at, role in enumerate("qkv"))
    mask = Mask({name: torch.tensor([0, 1, 17, 40, 41, 42])}, {name: (12, 4)}, layout, {"model": MODEL})
    mask.save(run / "mask.safetensors", force=True)
    page = Reader(write_report(run).read_text())
    assert [row[:2] for row in page.rows if row[0] in ("q", "k", "v")] == [["q", "2"], ["k", "1"], ["v", "3"]]


def test_a_mask_whose_weights_are_all_in_one_place_is_drawn():
    drawn = charts.to_svg(partial(charts.where, [Place(0, "q", 0, 0)]), charts.DARK)
    assert b"nan" not in drawn.lower()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.001, "0.1%"),
        (0.00123, "0.12%"),
        (0.0000004, "0.00004%"),
        (0.25, "25%"),
        (1.0, "100%"),
        (0.0, "0%"),
        (None, "?"),
    ],
)
def test_shares(value: float | None, text: str):
    assert share(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.345, "12.35"), (0.02361, "0.0236"), (12345.6, "12,346"), (0.0, "0"), (1e-5, "1.0e-05")],
)
def test_plain_figures(value: float, text: str):
    assert plain(value) == text
    assert plain(None) == plain(math.nan) == "–"


@pytest.mark.parametrize(("value", "text"), [(3.14, "3.1 s"), (312.4, "5 min 12 s"), (7300.0, "2 h 1 min")])
def test_durations(value: float, text: str):
    assert duration(value) == text


def test_the_running_mean_is_known_by_hand():
    assert charts.running_mean([0.0, 3.0, 6.0, 30.0], reach=1) == [1.5, 3.0, 13.0, 18.0]
