"""The command line: every command reads files, writes one artifact, and is one function with flat arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from keelweight.errors import UserError
from keelweight.progress import shown

if TYPE_CHECKING:
    from keelweight.inputs.models import ChatModel
    from keelweight.inputs.prompts import Prompt

app = typer.Typer(
    name="keelweight",
    help="Find the few weights that keep a language model safe, strengthen just those, and hold them still.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
guard_app = typer.Typer(help="Make a guard of your own.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(guard_app, name="guard")
patch_app = typer.Typer(help="Apply, revert or describe a patch.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(patch_app, name="patch")
out = Console()


class Rule(StrEnum):
    """How `select` chooses."""

    top = "top"
    bottom = "bottom"
    random = "random"


class Sigma(StrEnum):
    """Over what the spread of the weights is taken."""

    slice = "slice"
    tensor = "tensor"


class ObjectiveName(StrEnum):
    """What S is."""

    refusal = "refusal"
    guard = "guard"


class RelaxationName(StrEnum):
    """How the model's prediction becomes differentiable, for a guard."""

    gumbel = "gumbel"
    softmax = "softmax"
    straight_through = "straight-through"


class VocabularyName(StrEnum):
    """How the guard's vocabulary is carried over."""

    pieces = "pieces"
    reading = "reading"


class GuardKind(StrEnum):
    """What a guard is made of."""

    classifier = "classifier"
    causal = "causal"


class Reduction(StrEnum):
    """How prompts are summed."""

    signed = "signed"
    absolute = "absolute"


Model = Annotated[str, typer.Argument(help="Model folder, hub id, or builtin:smollm2.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Revision = Annotated[str | None, typer.Option(help="Commit or branch of a hub model.")]
System = Annotated[str | None, typer.Option(help="System prompt put before every prompt.")]
RemoteCode = Annotated[bool, typer.Option(help="Run Python code that comes with the model.")]
Force = Annotated[bool, typer.Option(help="Replace the output if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Field = Annotated[list[str], typer.Option(help="OURS=THEIRS, where a file names its fields otherwise.")]
Split = Annotated[str | None, typer.Option(help="Rows of this split only.")]
Transfer = Annotated[bool, typer.Option(help="Allow a mask made from other weights of the same shapes.")]


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the run.")] = Path("runs/demo"),
    model: Annotated[str, typer.Option(help="Model folder, hub id, or builtin:smollm2.")] = "builtin:smollm2",
    share: Annotated[float, typer.Option(help="Share of all parameters to tune.")] = 0.001,
    iterations: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    control: Annotated[bool, typer.Option(help="Also tune as many random weights, and show them beside.")] = False,
    eval_prompts: Annotated[int, typer.Option(help="Evaluation prompts of each kind.")] = 64,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make an unaligned model refuse by tuning 0.1% of its weights, and show it on a page."""
    from keelweight.demo import Settings, run_demo
    from keelweight.tuning.train import Recipe

    settings = Settings(
        model=model,
        share=share,
        recipe=Recipe(iterations=iterations),
        control=control,
        eval_prompts=eval_prompts,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    summary = run_demo(folder, settings, force=force, say=lambda line: note(line, as_json))
    if as_json:
        print_json(summary)
        return
    print_rates(summary, ["before", "after"] + (["control"] if control else []))
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds"].items())
    out.print(f"seconds: {stages}; total {summary['seconds_total']:.0f}, peak memory {summary['peak_rss_mb']} MB")
    out.print(f"page: {folder / 'report.html'}", highlight=False)


@app.command()
def score(
    model: Model,
    path: Annotated[Path, typer.Option("--out", help="Scores file to write.")] = Path("scores.safetensors"),
    prompts: Annotated[str, typer.Option(help="Harmful prompts, for `refusal` with refusals.")] = "builtin:harmful",
    split: Split = None,
    limit: Annotated[int | None, typer.Option(help="Use this many prompts, spread over categories.")] = 64,
    field: Field = [],  # noqa: B006
    objective: Annotated[
        ObjectiveName,
        typer.Option(help="Likelihood of refusing, or a guard's verdict on the model's own answers."),
    ] = ObjectiveName.refusal,
    contrast: Annotated[bool, typer.Option(help="refusal: subtract the likelihood of the model's own answer.")] = False,
    guard: Annotated[str | None, typer.Option(help="guard: folder or hub id of the guard.")] = None,
    guard_format: Annotated[str | None, typer.Option(help="guard: name or file of its format, if unknown.")] = None,
    safe_only: Annotated[bool, typer.Option(help="guard: S is the logit of safe alone (paper).")] = False,
    relaxation: Annotated[
        RelaxationName, typer.Option(help="guard: how predictions become differentiable.")
    ] = RelaxationName.gumbel,
    tau: Annotated[float, typer.Option(help="guard: temperature of the relaxation.")] = 0.3,
    vocabulary: Annotated[
        VocabularyName,
        typer.Option(help="guard: split guard tokens into the model's (paper), or read the model's."),
    ] = VocabularyName.pieces,
    end_to_end: Annotated[
        bool,
        typer.Option(help="guard: feed soft tokens to the guard in one graph, instead of a linear transfer."),
    ] = False,
    answer_tokens: Annotated[int, typer.Option(help="Most tokens in the model's own answers.")] = 64,
    paper: Annotated[bool, typer.Option(help="The paper's choices: see docs/method.md. Needs --guard.")] = False,
    sigma: Annotated[
        Sigma, typer.Option(help="Spread over a role's slice, or the whole tensor (paper).")
    ] = Sigma.slice,
    reduction: Annotated[
        Reduction, typer.Option(help="|mean gradient| (paper), or mean |gradient|.")
    ] = Reduction.signed,
    tokens_per_batch: Annotated[int, typer.Option(help="Padded tokens in a batch: time and memory.")] = 512,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    system: System = None,
    remote_code: RemoteCode = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Score every weight by Expected Safety Impact."""
    from keelweight.files import check_free
    from keelweight.inputs.guards import load_guard
    from keelweight.inputs.models import weights_digest
    from keelweight.inputs.responses import respond
    from keelweight.measure import Clock
    from keelweight.objectives.guard import GuardObjective, judged_cases
    from keelweight.objectives.guard import end_to_end as end_to_end_objective
    from keelweight.objectives.likelihood import refusal_cases, refusal_likelihood
    from keelweight.scores.esi import esi_scores
    from keelweight.scores.gradients import load_meter, save_meter

    if paper:
        objective, safe_only, relaxation, tau = ObjectiveName.guard, True, RelaxationName.gumbel, 0.3
        vocabulary, end_to_end, answer_tokens = VocabularyName.pieces, False, 256
        sigma, reduction, system = Sigma.tensor, Reduction.signed, "You are a helpful assistant."
    if (objective is ObjectiveName.guard) != (guard is not None):
        raise UserError("--objective guard (or --paper) and --guard MODEL belong together: give both or neither.")
    if contrast and guard is not None:
        raise UserError("--contrast belongs to --objective refusal; a guard's verdict needs none.")
    check_free(path, force=force)
    rows = read_prompts(prompts, split=split, fields=field, limit=limit, seed=seed)
    judge = None
    if guard is not None:
        judge = load_guard(
            guard,
            format=guard_format,
            dtype=dtype,
            device=device,
            remote_code=remote_code,
            safe_only=safe_only,
        )
    chat = open_model(model, dtype, device, revision, system, remote_code)
    clock = Clock()
    answers = None
    if contrast or judge is not None:
        with clock.stage("answers"):
            answers = respond(chat, rows, max_new_tokens=answer_tokens)
    source: dict[str, Any] = {
        "objective": objective.value,
        "prompt_source": prompts,
        "split": split,
        "seed": seed,
    }
    cases: Sequence[Any]
    take: Any
    about: dict[str, Any] = {}
    if judge is not None and answers is not None:
        with clock.stage("judging"):
            cases, table, transfer = judged_cases(chat, judge, answers, direction=vocabulary.value)
        options: dict[str, Any] = {"relaxation": relaxation.value, "tau": tau, "seed": seed}
        linear = GuardObjective(table, **options)
        take = end_to_end_objective(judge, table, **options) if end_to_end else linear
        source |= {"guard": dict(judge.source), "safe_only": safe_only, "vocabulary": vocabulary.value}
        source |= {**options, "end_to_end": end_to_end, "answer_tokens": answer_tokens, "system": system}
        about = {
            "skipped": dict(transfer.skipped) or 0,
            "characters aligned": f"{transfer.aligned_characters / transfer.characters:.1%}",
            "guard vocabulary mapped": f"{transfer.guard_vocabulary:.1%}",
            "model vocabulary reached": f"{transfer.model_vocabulary:.1%}",
        }
    else:
        cases, take = refusal_cases(chat, rows, answers), refusal_likelihood
        source |= {"contrast": contrast}
    partial = path.with_name(f".{path.name}.partial")
    run = source | {
        "weights": weights_digest(chat.model),
        "reduction": reduction.value,
        "tokens_per_batch": tokens_per_batch,
        "tokens": [case.tokens for case in cases],
    }
    meter = load_meter(partial, run)
    if meter is not None:
        note(f"going on after {meter.batches_done} batches of an interrupted run")
    try:
        with clock.stage("scoring"):
            scores = esi_scores(
                chat,
                take,
                cases,
                sigma=sigma.value,
                reduction=reduction.value,
                tokens_per_batch=tokens_per_batch,
                meter=meter,
                on_interrupt=lambda sums: save_meter(partial, sums, run),
                source=source,
            )
    except KeyboardInterrupt:
        stop(f"interrupted; the sums so far are in {partial}. Run the same command to go on.")
    scores.save(path, force=force)
    partial.unlink(missing_ok=True)
    about = {
        "objective": source["objective"],
        "S, mean": scores.about["objective_mean"],
        "S, standard deviation": scores.about["objective_spread"],
    } | about
    about |= {"prompts": scores.about["prompts"], "parameters": scores.about["parameters"]}
    about |= {
        "scored": sum(v.numel() for v in scores.values.values()),
        "seconds": clock.seconds,
        "out": str(path),
    }
    show(about, as_json)


@app.command()
def select(
    scores: Annotated[Path, typer.Argument(help="Scores file.")],
    path: Annotated[Path, typer.Option("--out", help="Mask file to write.")] = Path("mask.safetensors"),
    share: Annotated[float | None, typer.Option(help="Share of ALL parameters, such as 0.001.")] = None,
    count: Annotated[int | None, typer.Option(help="Number of weights, instead of a share.")] = None,
    rule: Annotated[Rule, typer.Option(help="Highest scores, lowest, or any at random.")] = Rule.top,
    role: Annotated[list[str], typer.Option(help="Only this role (q, k, v, o, gate, up, down, ...); repeatable.")] = [],  # noqa: B006
    layers: Annotated[str | None, typer.Option(help="Only these layers, such as 8-15 or 0,3,8-15.")] = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Turn scores into a mask: exact, over all scored tensors together."""
    from keelweight.files import check_free
    from keelweight.scores.store import load_scores
    from keelweight.selection.choose import choose
    from keelweight.selection.profile import profile

    check_free(path, force=force)
    if share is None and count is None:
        share = 0.001
    wanted = numbers_in(layers) if layers else None
    mask = choose(
        load_scores(scores),
        share=share,
        count=count,
        rule=rule.value,
        roles=role or None,
        layers=wanted,
        seed=seed,
    )
    mask.save(path, force=force)
    by_role: dict[str, int] = {}
    for place in profile(mask):
        by_role[place.role] = by_role.get(place.role, 0) + place.chosen
    show(
        {
            "weights": len(mask),
            "share": mask.source["share"],
            "rule": rule.value,
            **by_role,
            "out": str(path),
        },
        as_json,
    )


@app.command()
def tune(
    model: Model,
    train_only: Annotated[Path, typer.Option(help="Mask of the weights to train.")],
    path: Annotated[
        Path, typer.Option("--out", help="A .safetensors file: a patch. Otherwise: a model folder.")
    ] = Path("patch.safetensors"),
    log: Annotated[Path | None, typer.Option(help="Write losses, lr and gradient norm here as JSONL.")] = None,
    harmful: Annotated[str, typer.Option(help="Harmful prompts with refusals.")] = "builtin:harmful",
    harmless: Annotated[str, typer.Option(help="Prompts to go on answering.")] = "builtin:harmless",
    borderline: Annotated[str, typer.Option(help="Harmless prompts that look harmful.")] = "builtin:borderline",
    split: Split = None,
    field: Field = [],  # noqa: B006
    iterations: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    keep_weight: Annotated[float, typer.Option(help="Weight of staying as it is on harmless prompts.")] = 4.0,
    per_batch: Annotated[str, typer.Option(help="Harmful,harmless,borderline examples in a batch.")] = "2,4,4",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    system: System = None,
    remote_code: RemoteCode = False,
    transfer: Transfer = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Safety Enhancement Tuning: teach refusals by training the weights of a mask, and no other bit."""
    from dataclasses import asdict

    from keelweight.demo import training_log
    from keelweight.files import check_free, write_text
    from keelweight.inputs.models import save_model, weights_digest
    from keelweight.selection.mask import load_mask
    from keelweight.tuning.data import safety_mixture
    from keelweight.tuning.patch import chosen_values, make_patch
    from keelweight.tuning.train import Recipe
    from keelweight.tuning.train import tune as train

    check_free(path, force=force)
    if log is not None:
        check_free(log, force=force)
    counts = tuple(numbers_in(per_batch, ranges=False))
    if len(counts) != 3 or min(counts) < 0:
        raise UserError(f"--per-batch {per_batch}: expected three counts from 0, such as 2,4,4.")
    mask = load_mask(train_only)
    sources = (harmful, harmless, borderline)
    rows = [
        read_prompts(s, split=split, fields=field, seed=seed) if n else [] for s, n in zip(sources, counts, strict=True)
    ]
    chat = open_model(model, dtype, device, revision, system, remote_code)
    mask.check(chat.model, transfer=transfer)
    base, old = weights_digest(chat.model), chosen_values(chat.model, mask)
    recipe = Recipe(iterations=iterations, lr=lr, keep_weight=keep_weight, seed=seed)
    groups = safety_mixture(chat, *rows, per_batch=(counts[0], counts[1], counts[2]))
    checkpoint = path.with_name(f".{path.name}.checkpoint")
    try:
        steps = train(chat, groups, train_only=mask, recipe=recipe, transfer=transfer, checkpoint=checkpoint)
    except KeyboardInterrupt:
        stop(f"interrupted; the state is in {checkpoint}. Run the same command to go on.")
    about = {"model": dict(chat.source), "recipe": asdict(recipe), "mask": dict(mask.source)}
    if path.suffix == ".safetensors":
        make_patch(chat.model, mask, old, base_sha256=base, about=about).save(path, force=force)
    else:
        save_model(chat, path, force=force)
    if log is not None:
        write_text(log, training_log(steps), force=force)
    result = {
        "weights_trained": len(mask),
        "iterations": len(steps),
        "seconds": sum(s.seconds for s in steps),
    }
    show(result | {"first_loss": steps[0].loss, "last_loss": steps[-1].loss, "out": str(path)}, as_json)


@app.command()
def evaluate(
    model: Model,
    path: Annotated[Path, typer.Option("--out", help="Evaluation file to write.")] = Path("evaluation.json"),
    patch: Annotated[Path | None, typer.Option(help="Put this patch on the model first, in memory.")] = None,
    harmful: Annotated[str, typer.Option(help="Harmful prompts; 'none' leaves them out.")] = "builtin:harmful",
    harmless: Annotated[str, typer.Option(help="Harmless prompts; 'none' leaves them out.")] = "builtin:harmless",
    borderline: Annotated[str, typer.Option(help="Borderline prompts; 'none' leaves them out.")] = "builtin:borderline",
    split: Split = None,
    limit: Annotated[int | None, typer.Option(help="Prompts of each kind; all without it.")] = None,
    field: Field = [],  # noqa: B006
    guard: Annotated[str | None, typer.Option(help="Guard that judges answers to harmful prompts.")] = None,
    guard_format: Annotated[str | None, typer.Option(help="Its format: a known one, or a file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens in an answer.")] = 48,
    temperature: Annotated[float, typer.Option(help="0 is greedy; the paper samples at 0.9.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus, where answers are sampled; the paper's is 0.95.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Prompts answered together.")] = 32,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    system: System = None,
    remote_code: RemoteCode = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure attack success, over-refusal and harmless perplexity."""
    from keelweight.evaluation.evaluate import evaluate as measure
    from keelweight.evaluation.guard_judge import GuardJudge
    from keelweight.evaluation.judges import Judge, refusal_phrase_judge
    from keelweight.files import check_free, write_json
    from keelweight.inputs.guards import load_guard
    from keelweight.tuning.patch import load_patch

    check_free(path, force=force)
    sources = {"harmful": harmful, "harmless": harmless, "borderline": borderline}
    sets = {
        name: read_prompts(source, split=split, held_out=True, fields=field, limit=limit, seed=seed)
        for name, source in sources.items()
        if source != "none"
    }
    change = load_patch(patch) if patch else None
    judge: Judge = refusal_phrase_judge
    if guard is not None:
        judge = GuardJudge(load_guard(guard, format=guard_format, device=device, remote_code=remote_code))
    chat = open_model(model, dtype, device, revision, system, remote_code)
    if change is not None:
        change.apply(chat.model)
    found = measure(
        chat,
        sets,
        judge=judge,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
    ).to_json()
    found["about"] |= {"patch": str(patch) if patch else None, "sets": sources, "split": split}
    write_json(path, found, force=force)
    rates = {f"{name}_": rate for name, rate in found["rates"].items()}
    if as_json:
        print_json({key: value for key, value in found.items() if key != "answers"})
    else:
        print_rates(rates | {"harmless_ppl_": found["harmless_ppl"]}, [""])


@guard_app.command("train")
def guard_train(
    folder: Annotated[Path, typer.Option("--out", help="Folder of the guard to write.")],
    base: Annotated[str, typer.Option(help="Folder, hub id, builtin:minilm or builtin:smollm2.")] = "builtin:minilm",
    kind: Annotated[GuardKind | None, typer.Option(help="What the base becomes; without it, what it is.")] = None,
    examples: Annotated[
        str | None, typer.Option(help="Labelled answers (.jsonl, .csv: prompt, response, label safe or unsafe).")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Without --examples: an unaligned model, whose answers are the examples.")
    ] = "builtin:smollm2",
    limit: Annotated[int | None, typer.Option(help="Prompts of each kind; all without it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens in the model's answers.")] = 40,
    epochs: Annotated[int, typer.Option(help="Passes over the examples.")] = 3,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-5,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 16,
    seed: Seed = 0,
    device: Device = "auto",
    remote_code: RemoteCode = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a guard on this machine and measure it on held-out answers.

    The answers of an unaligned model to harmful prompts are made for the training and not kept.
    """
    from dataclasses import asdict

    from keelweight.files import check_free
    from keelweight.tuning import guard_training as training

    check_free(folder, force=force)
    recipe = training.GuardRecipe(epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)
    about: dict[str, Any] = {"base": base, "recipe": asdict(recipe)}
    if examples is not None:
        parts = training.read_examples(examples, seed=seed)
        about |= {"examples": Path(examples).name}
    else:
        chat = open_model(model, "auto", device, None, None, remote_code)
        made = {
            split: training.builtin_examples(chat, split, limit=limit, seed=seed, max_new_tokens=max_new_tokens)
            for split in ("train", "eval")
        }
        del chat
        parts = (made["train"][0], made["eval"][0])
        about |= {"examples": f"answers of {model}", "max_new_tokens": max_new_tokens}
        about |= {"left_out": {split: dict(skipped) for split, (_, skipped) in made.items()}}
    guard = training.new_guard(base, kind=kind.value if kind else None, device=device, seed=seed)
    losses = training.train_guard(guard, parts[0], recipe)
    found = training.measure_guard(guard, parts[1])
    about |= {"trained_on": len(parts[0]), "last_loss": sum(losses[-10:]) / len(losses[-10:])}
    rates = {name: rate.to_json() for name, rate in found.items() if name != "by_kind"}
    about |= {"held_out": rates | {"by_kind": {kind: rate.to_json() for kind, rate in found["by_kind"].items()}}}
    training.save_guard(guard, folder, about, force=force)
    if as_json:
        print_json(about)
        return
    titles = {
        "accuracy": "accuracy",
        "unsafe_recall": "unsafe answers found",
        "safe_recall": "safe answers let through",
    }
    titles |= {kind: f"right on {kind}s" for kind in found["by_kind"]}
    print_rates({f"{name}_": rate for name, rate in (rates | about["held_out"]["by_kind"]).items()}, [""], titles)
    note(f"wrote {folder}: --guard {folder} takes it.")


@patch_app.command("apply")
def patch_apply(
    model: Model,
    patch: Annotated[Path, typer.Argument(help="Patch file.")],
    folder: Annotated[Path, typer.Option("--out", help="Model folder to write.")],
    dtype: Annotated[str, typer.Option(help="auto is the dtype the patch was made in.")] = "auto",
    revision: Revision = None,
    remote_code: RemoteCode = False,
    force: Force = False,
) -> None:
    """Write the patched model as a folder that plain transformers loads."""
    repatch(model, patch, folder, dtype, revision, remote_code, force, revert=False)


@patch_app.command("revert")
def patch_revert(
    model: Model,
    patch: Annotated[Path, typer.Argument(help="Patch file.")],
    folder: Annotated[Path, typer.Option("--out", help="Model folder to write.")],
    dtype: Annotated[str, typer.Option(help="auto is the dtype the patch was made in.")] = "auto",
    revision: Revision = None,
    remote_code: RemoteCode = False,
    force: Force = False,
) -> None:
    """Take the patch off a patched model: the base model, bit for bit."""
    repatch(model, patch, folder, dtype, revision, remote_code, force, revert=True)


@patch_app.command("info")
def patch_info(patch: Annotated[Path, typer.Argument(help="Patch file.")], as_json: AsJson = False) -> None:
    """Say what a patch changes and which model it belongs to."""
    from keelweight.tuning.patch import load_patch

    loaded = load_patch(patch)
    changed = sum(int((loaded.old[name] != loaded.new[name]).sum()) for name in loaded.indices)
    about = {
        "model": loaded.about["model"]["name"],
        "dtype": loaded.about["model"]["dtype"],
        "weights": len(loaded),
        "changed": changed,
        "parameters_touched": len(loaded.indices),
        "base_sha256": loaded.about["base_sha256"],
        "patched_sha256": loaded.about["patched_sha256"],
    }
    show(about | {"recipe": loaded.about.get("recipe")} if as_json else about, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder with before.json, after.json, mask.safetensors, ...")],
    path: Annotated[Path | None, typer.Option("--out", help="Page to write; report.html in the folder.")] = None,
    force: Force = False,
) -> None:
    """Make one self-contained HTML page of a run folder, and its charts."""
    from keelweight.report.page import write_report

    out.print(f"page: {write_report(run, path, force=force)}", highlight=False)


def repatch(
    model: str,
    patch: Path,
    folder: Path,
    dtype: str,
    revision: str | None,
    remote_code: bool,
    force: bool,
    *,
    revert: bool,
) -> None:
    """Load, apply or revert, save."""
    from keelweight.files import check_free
    from keelweight.inputs.models import save_model
    from keelweight.tuning.patch import load_patch

    check_free(folder, force=force)
    change = load_patch(patch)
    kind = change.about["model"]["dtype"] if dtype == "auto" else dtype
    chat = open_model(model, kind, "cpu", revision, None, remote_code)
    (change.revert if revert else change.apply)(chat.model)
    save_model(chat, folder, force=force)
    out.print(f"{'reverted' if revert else 'patched'} model: {folder}", highlight=False)


def open_model(
    name: str, dtype: str, device: str, revision: str | None, system: str | None, remote_code: bool
) -> ChatModel:
    """Load the model a command works on."""
    from keelweight.inputs.models import load_model

    return load_model(name, dtype=dtype, device=device, revision=revision, system=system, remote_code=remote_code)


def read_prompts(
    source: str,
    *,
    split: str | None,
    fields: Sequence[str],
    limit: int | None = None,
    seed: int = 0,
    held_out: bool = False,
) -> list[Prompt]:
    """Prompts from the command line's options. A built-in set is split: train to learn from, eval held out."""
    from keelweight.inputs.prompts import load_prompts

    pairs = [field.partition("=") for field in fields]
    if wrong := [field for field, (_, equals, theirs) in zip(fields, pairs, strict=True) if not equals or not theirs]:
        raise UserError(f"--field {wrong[0]}: expected OURS=THEIRS, such as prompt=question.")
    if split is None and source.startswith("builtin:"):
        split = "eval" if held_out else "train"
    renamed = {} if source.startswith("builtin:") else {ours: theirs for ours, _, theirs in pairs}
    return load_prompts(source, split=split, fields=renamed, limit=limit, seed=seed)


def numbers_in(text: str, *, ranges: bool = True) -> list[int]:
    """The numbers in "0,3,8-15"."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not (ranges and last.isdigit())):
            raise UserError(f"{text!r}: expected numbers such as {'0,3,8-15' if ranges else '3,1,2'}.")
        found += range(int(first), int(last) + 1) if dash else [int(first)]
    return found


def show(about: Mapping[str, Any], as_json: bool) -> None:
    """Print a result: two columns, or JSON."""
    if as_json:
        print_json(about)
        return
    table = Table(show_header=False, box=None)
    for key, value in about.items():
        text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(key.replace("_", " "), text)
    out.print(table, highlight=False)


TITLES = {
    "asr": "attack success",
    "over_refusal": "refused, harmless",
    "borderline_refusal": "refused, borderline",
}


def print_rates(found: Mapping[str, Any], columns: Sequence[str], titles: Mapping[str, str] = TITLES) -> None:
    """Print rates with interval and counts, one column a state; `found` as in summary.json."""
    table = Table()
    table.add_column("rate [95% interval] (count)")
    for column in columns:
        table.add_column(column or "measured")
    for key, title in titles.items():
        if f"{key}_{columns[0]}" in found:
            table.add_row(title, *(rate_text(found[f"{key}_{column}"]) for column in columns))
    perplexities = [found.get(f"harmless_ppl_{column}") for column in columns]
    if all(value is not None for value in perplexities):
        table.add_row("perplexity, harmless", *(f"{value:.2f}" for value in perplexities))
    out.print(table, highlight=False)


def rate_text(rate: Mapping[str, Any]) -> str:
    """A rate of summary.json in words."""
    from keelweight.evaluation.rates import Rate

    return str(Rate(rate["hits"], rate["judged"], rate["unscored"]))


def print_json(data: Any) -> None:
    """Print JSON to the output stream."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def note(line: str, quiet: bool = False) -> None:
    """Say something beside the result, on the error stream."""
    if not quiet:
        typer.echo(line, err=True)


def stop(line: str) -> NoReturn:
    """End an interrupted command: exit code 1."""
    typer.echo(f"keelweight: {line}", err=True)
    raise typer.Exit(1)


def main() -> None:
    """Run the command line. Exit code 0: done; 1: interrupted or failed; 2: the input is wrong."""
    try:
        with shown():
            app()
    except UserError as error:
        typer.echo(f"keelweight: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("keelweight: interrupted", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
