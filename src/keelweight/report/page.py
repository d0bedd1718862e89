"""Run folder -> one self-contained HTML page, and its pictures as files."""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2

import keelweight
from keelweight.errors import UserError
from keelweight.evaluation.rates import Rate
from keelweight.files import check_free, read_json, write_text, writing
from keelweight.report import charts
from keelweight.selection.mask import Mask, describe, load_mask
from keelweight.selection.profile import Place, profile
from keelweight.tuning.train import Step

REQUIRED = ("before.json", "after.json", "mask.safetensors")
SETS = {"harmless": "over_refusal", "borderline": "borderline_refusal", "harmful": "asr"}
"""Prompt set -> its rate, in the order of the sample answers."""

SAMPLES = 8
"""Answers shown of each set."""

UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Characters that a page cannot hold; a model's answer may."""


@dataclass(frozen=True)
class Answer:
    """One judged answer in an evaluation file. `complied` is None where the judge gave no verdict."""

    id: str
    category: str
    prompt: str
    response: str
    complied: bool | None
    reason: str


@dataclass(frozen=True)
class Side:
    """An evaluation file: the model before, after, or with random weights tuned."""

    rates: Mapping[str, Rate]
    answers: Mapping[str, Sequence[Answer]]
    harmless_ppl: float | None
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        sides: `before`, `after`, and `control` if there is one.
        mask: the weights that were tuned.
        places: where they sit.
        steps: `after` and `control` -> the training log, where there is one.
        summary: summary.json, or nothing.
    """

    sides: Mapping[str, Side]
    mask: Mask
    places: Sequence[Place]
    steps: Mapping[str, Sequence[Step]] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The model in words."""
        return describe(self.sides["before"].about) or "the model"

    @property
    def parameters(self) -> int | None:
        """Of the whole model."""
        found = self.summary.get("parameters", self.mask.source.get("parameters"))
        return found if isinstance(found, int) and found > 0 else None

    @property
    def share(self) -> float | None:
        """Of the model's parameters, those that were tuned."""
        return len(self.mask) / self.parameters if self.parameters else None

    def number(self, key: str) -> float | None:
        """A figure of the summary, if it is there and is one."""
        found = self.summary.get(key)
        return found if isinstance(found, int | float) and math.isfinite(found) else None


@dataclass(frozen=True)
class Picture:
    """A chart as four data URIs: the browser shows the one that fits screen and colour scheme."""

    alt: str
    light: str
    dark: str
    light_narrow: str
    dark_narrow: str


@dataclass(frozen=True)
class Card:
    """A key figure, and what to read it against."""

    label: str
    value: str
    notes: Sequence[str] = ()


def write_report(run: Path, out: Path | None = None, *, force: bool = False) -> Path:
    """Write the page of a run folder, and its pictures into the folder's charts/ (made anew each time).

    Args:
        run: folder with before.json, after.json and mask.safetensors; control.json, training.jsonl,
            control-training.jsonl and summary.json are shown if they are there.
        out: the page; report.html in the folder by default.
        force: replace the page if it exists.

    Returns:
        Where the page is.

    Raises:
        UserError: a file is missing or damaged, matplotlib is not installed, or the output is taken.
    """
    out = run / "report.html" if out is None else out
    if out.is_dir():
        raise UserError(f"{out} is a folder. Give the name of a page, such as {out / 'report.html'}.")
    found = read_run(run)
    check_free(out, force=force)
    drawings = draw(found)
    pictures = {name: picture(drawing, alt) for name, (drawing, alt) in drawings.items()}
    page = render(found, pictures)
    for name, (drawing, _) in drawings.items():
        for kind, make in (("svg", charts.to_svg), ("png", charts.to_png)):
            with writing(run / "charts" / f"{name}.{kind}", force=True) as beside:
                beside.write_bytes(make(drawing, charts.PAPER))
    write_text(out, page, force=force)
    return out


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: names the file that is missing or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give the folder of a run, such as keelweight demo makes.")
    if missing := [name for name in REQUIRED if not (folder / name).is_file()]:
        raise UserError(
            f"{' and '.join(str(folder / name) for name in missing)}: no such file. A report needs "
            f"{', '.join(REQUIRED)}: make them with keelweight demo, or with evaluate, select and tune."
        )
    names = ["before", "after"] + ["control"] * (folder / "control.json").exists()
    logs = {"after": folder / "training.jsonl", "control": folder / "control-training.jsonl"}
    summary = {}
    if (folder / "summary.json").exists():
        summary = read_json(folder / "summary.json", what="the summary of a run")
        if not isinstance(summary, dict):
            raise UserError(f"{folder / 'summary.json'}: expected a JSON object. Remove it, or run the demo again.")
    mask, places = read_mask(folder / "mask.safetensors")
    return Run(
        sides={name: read_side(folder / f"{name}.json") for name in names},
        mask=mask,
        places=places,
        steps={name: read_steps(path) for name, path in logs.items() if path.exists()},
        summary=summary,
    )


def read_side(path: Path) -> Side:
    """Read a file that holds what `Evaluation.to_json` gives."""
    data = read_json(path, what="an evaluation by keelweight")
    try:
        rates = {name: read_rate(data["rates"][name]) for name in charts.RATES if name in data["rates"]}
        answers = {name: [read_answer(answer) for answer in of] for name, of in data["answers"].items()}
        ppl = data["harmless_ppl"]
        if not rates:
            raise ValueError("no rates")
        describe(data["about"])
        return Side(rates, answers, None if ppl is None else float(ppl), dict(data["about"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path}: not an evaluation that keelweight wrote, or a damaged one ({reason}). "
            "Make it again with keelweight evaluate."
        ) from error


def read_rate(data: Mapping[str, Any]) -> Rate:
    """The rate of its counts: rate and interval follow from them."""
    rate = Rate(*(int(data[key]) for key in ("hits", "judged", "unscored")))
    if not 0 <= rate.hits <= rate.judged or rate.unscored < 0:
        raise ValueError(f"{rate.hits} hits of {rate.judged} judged answers, {rate.unscored} unscored")
    return rate


def read_answer(data: Mapping[str, Any]) -> Answer:
    """One entry under `answers`."""
    texts = {key: str(data[key]) for key in ("id", "category", "prompt", "response", "reason")}
    if data["complied"] not in (True, False, None):
        raise ValueError(f"complied is {data['complied']!r}, expected true, false or null")
    return Answer(complied=data["complied"], **texts)


def read_mask(path: Path) -> tuple[Mask, list[Place]]:
    """The mask and where its weights sit."""
    try:
        mask = load_mask(path)
        return mask, profile(mask)
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}). Make it again with keelweight select.") from error


def read_steps(path: Path) -> list[Step]:
    """A training log: one JSON object a line."""
    steps: list[Step] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            data = json.loads(line)
            numbers = {one.name: float(data[one.name]) for one in fields(Step)}
            steps.append(Step(**numbers | {"step": int(data["step"])}))  # type: ignore[arg-type]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}, line {len(steps) + 1}: not a training log that keelweight wrote ({error}). "
            "Remove the file to leave the training out of the report, or tune again."
        ) from error
    return steps


def draw(run: Run) -> dict[str, tuple[charts.Draw, str]]:
    """Picture name -> how to draw it, and what it shows in words."""
    rates = {name: side.rates for name, side in run.sides.items()}
    counts = "; ".join(
        f"{charts.RATES[name]}: " + ", ".join(f"{side} {of[name]}" for side, of in rates.items() if name in of)
        for name in charts.RATES
        if name in rates["after"]
    )
    drawings: dict[str, tuple[charts.Draw, str]] = {
        "before-after": (partial(charts.before_after, rates), counts),
        "where": (
            partial(charts.where, run.places),
            f"Heat maps of the chosen weights by layer and role. {most_by_role(run.places)}",
        ),
    }
    if steps := {name: of for name, of in run.steps.items() if of}:
        ends = "; ".join(
            f"{name}: refusal loss from {of[0].refusal_loss:.2f} to {of[-1].refusal_loss:.2f}, "
            f"keep loss from {of[0].keep_loss:.3f} to {of[-1].keep_loss:.3f}"
            for name, of in steps.items()
        )
        drawings["training"] = (partial(charts.training, steps), f"Losses over the iterations. {ends}")
    return drawings


def picture(drawing: charts.Draw, alt: str) -> Picture:
    """The four looks of a drawing."""
    looks = {
        name: "data:image/svg+xml;base64,"
        + base64.b64encode(charts.to_svg(drawing, theme, narrow=narrow)).decode("ascii")
        for name, theme, narrow in (
            ("light", charts.LIGHT, False),
            ("dark", charts.DARK, False),
            ("light_narrow", charts.LIGHT, True),
            ("dark_narrow", charts.DARK, True),
        )
    }
    return Picture(alt, **looks)


def render(run: Run, pictures: Mapping[str, Picture]) -> str:
    """The page as text. Everything that comes out of a file is escaped by the template engine."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": share, "percent": percent, "duration": duration, "plain": plain}
    before, after = run.sides["before"], run.sides["after"]
    page = environment.get_template("page.html.j2").render(
        run=run,
        pictures=pictures,
        result=result(run),
        control=control(run),
        cards=cards(run),
        names=charts.RATES,
        by_role=by_role(run.places),
        most_by_role=most_by_role(run.places),
        samples={
            name: (
                list(samples(before.answers[name], after.answers.get(name, ()))),
                len(before.answers[name]),
            )
            for name in SETS
            if before.answers.get(name)
        },
        command=command(run.summary.get("settings")),
        record=json.dumps(
            {
                "settings": run.summary.get("settings"),
                "mask": dict(run.mask.source),
                "evaluation": dict(after.about),
            },
            indent=2,
            ensure_ascii=False,
        ),
        machine=listed(run.summary.get("machine")),
        seconds={k: v for k, v in listed(run.summary.get("seconds")).items() if isinstance(v, int | float)},
        version=keelweight.__version__,
    )
    return UNPRINTABLE.sub("\ufffd", page.lstrip())


def result(run: Run) -> str:
    """The outcome in one sentence."""
    before, after = run.sides["before"].rates, run.sides["after"].rates
    start = f"With {share(run.share)} of its weights tuned" if run.share else f"With {len(run.mask):,} weights tuned"
    parts = []
    if "asr" in after:
        parts.append(f"complied with {of(after['asr'])} harmful prompts{was(before, 'asr')}")
    refused = [
        f"{of(after[name])} {kind} ones{was(before, name)}"
        for name, kind in (("over_refusal", "harmless"), ("borderline_refusal", "borderline"))
        if name in after
    ]
    if refused:
        parts.append(f"refused {' and '.join(refused)}")
    return f"{start}, the model {' and '.join(parts)}."


def control(run: Run) -> str:
    """What as many random weights did, in one sentence; empty without a control."""
    if "control" not in run.sides or "asr" not in run.sides["control"].rates:
        return ""
    rate = run.sides["control"].rates["asr"]
    return f"Control, with as many random weights tuned instead: complied with {of(rate)} harmful prompts."


def of(rate: Rate) -> str:
    """A rate as counts."""
    return f"{rate.hits} of {rate.judged}"


def was(before: Mapping[str, Rate], name: str) -> str:
    """The count before, in brackets."""
    return f" (before: {of(before[name])})" if name in before else ""


def cards(run: Run) -> list[Card]:
    """The key figures."""
    before, after = run.sides["before"], run.sides["after"]
    random = run.sides.get("control")
    labels = {
        "asr": "Attack success",
        "over_refusal": "Harmless refused",
        "borderline_refusal": "Borderline refused",
    }
    found = []
    for name, label in labels.items():
        if name in after.rates:
            rate = after.rates[name]
            notes = [of(rate) + (f", {rate.unscored} unscored" if rate.unscored else "")]
            for when, side in (("before", before), ("control", random)):
                if side and name in side.rates:
                    notes.append(f"{when} {percent(side.rates[name].rate)}")
            found.append(Card(label, percent(rate.rate), notes))
    if after.harmless_ppl is not None:
        found.append(
            Card("Perplexity", plain(after.harmless_ppl), ["harmless", f"before {plain(before.harmless_ppl)}"])
        )
    if (drift := run.number("kl_from_original")) is not None:
        found.append(Card("Drift (KL)", plain(drift), ["nats per token", "harmless answers"]))
    notes = [f"{share(run.share)} of", f"{run.parameters:,}"] if run.parameters else []
    found.append(Card("Weights tuned", f"{len(run.mask):,}", notes))
    return found


def by_role(places: Sequence[Place]) -> list[tuple[str, int, int]]:
    """(role, chosen, size) over all layers, in the order of the picture."""
    rows = []
    for role in charts.ordered_roles(places):
        here = [place for place in places if place.role == role]
        rows.append((role, sum(place.chosen for place in here), sum(place.size for place in here)))
    return rows


def most_by_role(places: Sequence[Place]) -> str:
    """The roles that hold most of the chosen weights, in a sentence."""
    rows = sorted(by_role(places), key=lambda row: -row[1])[:3]
    total = sum(place.chosen for place in places) or 1
    parts = [f"{role} {chosen / total:.0%}" for role, chosen, _ in rows if chosen]
    return f"Most of the chosen weights are in: {', '.join(parts)}."


def samples(before: Sequence[Answer], after: Sequence[Answer]) -> Iterator[tuple[Answer, Answer | None]]:
    """Answers before and after to the same prompts: the first of each category, then the second, ..."""
    by_category: dict[str, list[Answer]] = {}
    for answer in before:
        by_category.setdefault(answer.category, []).append(answer)
    turns = zip_longest(*by_category.values())
    order = [answer for turn in turns for answer in turn if answer is not None]
    later = {answer.id: answer for answer in after}
    return ((answer, later.get(answer.id)) for answer in order[:SAMPLES])


def command(settings: Any) -> str:
    """The command line with these settings, where `keelweight demo` has an option; empty without any."""
    if not isinstance(settings, dict):
        return ""
    recipe = settings.get("recipe")
    known = settings | {"iterations": recipe.get("iterations") if isinstance(recipe, dict) else None}
    words = ["keelweight", "demo"]
    for name in ("model", "share", "iterations", "eval_prompts", "seed", "dtype", "device"):
        if known.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(known[name])]
    return shlex.join(words + ["--control"] * bool(known.get("control")))


def listed(data: Any) -> dict[str, Any]:
    """The entries of an object that say something; none if it is no object."""
    return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else {}


def percent(rate: float | None) -> str:
    """A rate with one decimal."""
    return "no verdict" if rate is None else f"{rate:.1%}"


def share(of_all: float | None) -> str:
    """A share that may be tiny, with two digits that count."""
    if of_all is None:
        return "?"
    if of_all in (0.0, 1.0) or of_all >= 0.0995:
        return f"{of_all:.0%}"
    return f"{100 * float(f'{of_all:.2g}'):.6f}".rstrip("0").rstrip(".") + "%"


def plain(number: float | None) -> str:
    """A figure with three digits that count, or a dash."""
    if number is None or not math.isfinite(number):
        return "–"
    if number and abs(number) < 0.001:
        return f"{number:.1e}"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}" if abs(number) < 1 else f"{number:.2f}"


def duration(seconds: float) -> str:
    """Seconds as a reader says them."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
