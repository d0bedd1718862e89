"""Guards: models that read a request together with its answer and say how safe the answer is."""

from __future__ import annotations

import itertools
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor, nn

from keelweight.errors import UserError
from keelweight.inputs.guard_formats import KNOWN, PAIR_CLASSIFIER, GuardFormat, find_format, recognise
from keelweight.inputs.models import DTYPES, _locate, _quiet, machine_device, machine_dtype

Render = Callable[[str, str], str]
DECLARATION = "guard.json"
SAFE_LABELS = frozenset({
    "safe", "harmless", "unharmful", "not harmful", "non harmful", "benign", "nontoxic", "non toxic",
    "not toxic", "non hate", "not hate", "nothate", "no hate", "not offensive", "non offensive", "clean",
    "acceptable", "appropriate", "ok",
})  # fmt: skip
UNSAFE_LABELS = frozenset({
    "unsafe", "harmful", "toxic", "severe toxic", "toxicity", "severe toxicity", "obscene", "threat",
    "insult", "identity attack", "identity hate", "sexual explicit", "hate", "hateful", "offensive",
    "abusive", "unacceptable", "inappropriate", "violence", "sexual", "self harm", "harassment",
})  # fmt: skip
"""Names of labels, in lower case with spaces, whose meaning nobody has to be asked for."""


class Unreadable(UserError):
    """The guard cannot read this one request and answer; the message says why. It can read others."""


@dataclass(frozen=True)
class Reading:
    """A request and its answer as a guard reads them.

    Attributes:
        ids: token ids, with special tokens and, for a guard that answers with a word, what it says first.
        spans: per token, the characters (start, end) of the answer that it covers; None where it covers
            none. Tokens of one character (an emoji in several bytes) share its span.
        types: token types, where the guard tells request and answer apart by them; else empty.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int] | None, ...]
    types: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens the guard reads."""
        return len(self.ids)


@dataclass(frozen=True)
class Padded:
    """Readings side by side, padded on the right.

    Attributes:
        ids: (readings, width), int64.
        attention_mask: (readings, width), 1 where there is a token.
        types: (readings, width) token types; None where the guard has none.
    """

    ids: Int[Tensor, "readings width"]
    attention_mask: Int[Tensor, "readings width"]
    types: Int[Tensor, "readings width"] | None


@dataclass(frozen=True)
class Guard:
    """A model that judges answers, with the tokenizer and the format it was trained with.

    Attributes:
        model: in eval mode, no parameter asks for a gradient.
        tokenizer: a fast tokenizer.
        format: how it is asked and how it answers.
        source: name, revision and dtype: enough to load it again.
        safe_only: S is the logit of safe alone, as in the paper, instead of safe against unsafe.
    """

    model: Any
    tokenizer: Any
    format: GuardFormat
    source: Mapping[str, str] = field(default_factory=dict)
    safe_only: bool = False

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return self.embedding().weight.device

    def embedding(self) -> nn.Embedding:
        """The input embeddings. What the model reads is this module's output, which may scale its table."""
        return self.model.get_input_embeddings()

    def read(self, prompt: str, response: str) -> Reading:
        """The request and its answer in the guard's format, as tokens that know their place in the answer.

        Text of the request or answer that spells a special token of the guard ("<|eot_id|>") is broken by a
        space, so that an answer cannot end its own turn and speak for the guard.

        Raises:
            Unreadable: the text is longer than the guard's context, holds lone surrogates, or is altered by
                the guard's template in a way that loses the place of its characters. Nothing is ever cut.
            UserError: a template that does not show the answer exactly once.
        """
        for text in (prompt, response):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise Unreadable("lone surrogates are not text that a guard can read.")
        asked, _ = break_words(prompt, self.control_words)
        answer, origin = break_words(response, self.control_words)
        shown = [place(render, asked, answer) for render in self._renderers()]
        if sum(where is not None for _, where in shown) != 1:
            count = sum(where is not None for _, where in shown)
            raise UserError(f"{self._name}: its template shows the answer {count} times. Expected once.")
        ids, spans, types = self._tokens(shown, origin)
        if self.format.kind == "causal":
            said = self._said(ids)
            ids, spans = ids + said, spans + (None,) * len(said)
        if self.limit is not None and len(ids) > self.limit:
            raise Unreadable(f"too long for the guard: {len(ids)} tokens, it reads {self.limit}.")
        return Reading(ids, spans, types)

    def safety(
        self,
        inputs_embeds: Float[Tensor, "readings width hidden"],
        attention_mask: Int[Tensor, "readings width"],
        types: Int[Tensor, "readings width"] | None = None,
    ) -> Float[Tensor, " readings"]:
        """S of each row, higher is safer: fp32 (fp64 in a float64 guard), differentiable in `inputs_embeds`.

        Causal: logit of the safe word minus logit of the unsafe word (their first tokens) behind the last
        attended token. Classifier: logsumexp of the safe labels' logits minus that of the unsafe labels';
        without labels of one side (one logit, several independent labels) that side is 0. With `safe_only`:
        the safe side alone.

        Args:
            inputs_embeds: what `embedding()` gives for the tokens, padded on the right.
            attention_mask: 1 where there is a token.
            types: token types, for guards that have them (see `Reading`).
        """
        if types is None and self.uses_types:
            raise UserError(f"{self._name}: tells request and answer apart by token types, and got none.")
        safe, unsafe = self.sides(self._logits(inputs_embeds, attention_mask, types))
        return safe if self.safe_only else safe - unsafe

    def pad(self, readings: Sequence[Reading]) -> Padded:
        """The readings as one batch on the guard's device."""
        width = max(reading.tokens for reading in readings)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(readings), width), 0 if pad is None else pad)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, reading in enumerate(readings):
            ids[row, : reading.tokens] = torch.tensor(reading.ids)
            mask[row, : reading.tokens] = 1
            if reading.types:
                types[row, : reading.tokens] = torch.tensor(reading.types)
        kept = types.to(self.device) if self.uses_types else None
        return Padded(ids.to(self.device), mask.to(self.device), kept)

    def score(self, readings: Sequence[Reading]) -> Float[Tensor, " readings"]:
        """S of the readings in one padded batch."""
        batch = self.pad(readings)
        return self.safety(self.embedding()(batch.ids), batch.attention_mask, batch.types)

    @torch.no_grad()
    def answer_probability(self, readings: Sequence[Reading]) -> Float[Tensor, " readings"]:
        """Causal guards: probability that the next token begins one of the two words; classifiers: 1.

        Near 0 means that the format does not fit the guard: it would say something else at this place.
        """
        if self.format.kind == "classifier":
            return torch.ones(len(readings))
        return self.logits(readings).softmax(-1)[:, [*self.outputs[0], *self.outputs[1]]].sum(-1)

    def logits(self, readings: Sequence[Reading]) -> Float[Tensor, "readings outputs"]:
        """Logits of the vocabulary behind the last token (causal), or of the labels, in one padded batch."""
        batch = self.pad(readings)
        return self._logits(self.embedding()(batch.ids), batch.attention_mask, batch.types)

    def sides(self, logits: Float[Tensor, "readings outputs"]) -> tuple[Tensor, Tensor]:
        """logsumexp over the safe and over the unsafe words or labels, (readings,) each; 0 for a side without any."""
        safe, unsafe = (_side(logits, numbers) for numbers in self.outputs)
        return safe, unsafe

    @cached_property
    def outputs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Positions of the safe and of the unsafe logits: token ids of the words, or numbers of the labels.

        Raises:
            UserError: words that begin with the same token or merge with what stands before them; labels
                whose meaning is unknown.
        """
        if self.format.kind == "classifier":
            return label_sides(self.model.config, self.format, self._name)
        found = set()
        choices = [piece if isinstance(piece, tuple) else (piece,) for piece in self._prefix]
        for said in itertools.product(*choices):
            sides = (self.format.safe, self.format.unsafe)
            found.add(tuple(self._first_tokens(said, [side] if isinstance(side, str) else side) for side in sides))
        if len(found) > 1:
            raise UserError(f"{self._name}: the words begin with other tokens after other lines before them.")
        safe, unsafe = found.pop()
        if shared := set(safe) & set(unsafe):
            raise UserError(
                f"{self._name}: {self.format.safe!r} and {self.format.unsafe!r} begin with the same token "
                f"{self.tokenizer.convert_ids_to_tokens(shared.pop())!r}, so it tells nothing. Declare other "
                "words, or put the part they share into answer_prefix."
            )
        return safe, unsafe

    @cached_property
    def limit(self) -> int | None:
        """The most tokens the guard reads; None if it does not say."""
        config = self.model.config.get_text_config()
        limits = [self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
        for name, module in self.model.named_modules():  # RoBERTa counts positions from its padding index
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                limits.append(module.num_embeddings - module.padding_idx - 1)
        known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
        return min(known) if known else None

    @cached_property
    def uses_types(self) -> bool:
        """Whether token types tell the two texts of a pair apart."""
        if len(self.format.texts) < 2:
            return False
        sizes = getattr(self.model.config, "type_vocab_size", 0) or 0
        return sizes > 1 and any(self.tokenizer("a", "b").get("token_type_ids", ()))

    @cached_property
    def control_words(self) -> tuple[str, ...]:
        """Special tokens, and added tokens that the template is made of: no answer may spell them."""
        words = set(self.tokenizer.all_special_tokens)
        frame = self._frame if self.format.kind == "causal" else ""
        for token in self.tokenizer.added_tokens_decoder.values():
            text = token.content
            if token.special or (text in frame and not text.isalnum() and not text.isspace()):
                words.add(text)
        return tuple(sorted(word for word in words if len(word) > 1))

    def check(self) -> None:
        """Find out now what would otherwise fail at the first answer.

        Raises:
            UserError: the format does not fit the tokenizer or the labels.
        """
        reading = self.read("What is it?", "It is this.")
        if not any(reading.spans):
            raise UserError(f"{self._name}: its template shows nothing of the answer.")
        _ = self.outputs

    @property
    def _name(self) -> str:
        return self.source.get("name") or f"guard format {self.format.name}"

    def _renderers(self) -> list[Render]:
        """What makes the guard's text, or its two texts, from a request and an answer."""
        return [partial(fill, text) for text in self.format.texts] or [self._chat]

    def _chat(self, prompt: str, response: str) -> str:
        return self._chat_as(prompt, response, parts=self._wants_parts)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the chat template shows a turn only if its content is a list of typed parts."""
        marker = _marker("")
        try:
            return marker not in self._chat_as("a", marker, parts=False)
        except UserError:
            return True

    def _chat_as(self, prompt: str, response: str, *, parts: bool) -> str:
        texts = [(role, fill(text, prompt, response)) for role, text in self.format.turns]
        turns = [{"role": role, "content": [{"type": "text", "text": t}] if parts else t} for role, t in texts]
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self.format.chat_options
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self._name}: its chat template fails ({reason}).") from error

    def _tokens(
        self, shown: list[tuple[str, Place | None]], origin: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int] | None, ...], tuple[int, ...]]:
        """Ids, spans and types of the guard's text or pair of texts."""
        texts = [text for text, _ in shown]
        classifier = self.format.kind == "classifier"
        coded = self.tokenizer(*texts, add_special_tokens=classifier, return_offsets_mapping=True, verbose=False)
        which = coded.sequence_ids()
        spans = []
        for at, (start, end) in zip(which, coded["offset_mapping"], strict=True):
            where = shown[at][1] if at is not None else None
            spans.append(where.span(start, end, origin) if where else None)
        ids = tuple(coded["input_ids"])
        forbidden = self._control_ids
        if any(token in forbidden for token, span in zip(ids, spans, strict=True) if span):
            raise Unreadable("the answer holds a special token of the guard.")
        if not classifier and not self._begins_itself(texts[0]):
            ids, spans = self._opening + ids, [None] * len(self._opening) + spans
        return ids, tuple(spans), tuple(coded["token_type_ids"]) if self.uses_types else ()

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        ids = {self.tokenizer.convert_tokens_to_ids(word) for word in self.control_words}
        return frozenset(ids - {self.tokenizer.unk_token_id})

    @cached_property
    def _opening(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text: the beginning-of-text token, if it has one."""
        ids = self.tokenizer("").input_ids
        return tuple(ids[:1]) if ids and ids[0] == self.tokenizer.bos_token_id else ()

    def _begins_itself(self, text: str) -> bool:
        """Whether a text has its beginning-of-text token spelled out, as chat templates do."""
        chat = not self.format.template
        return chat or bool(self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def _plain_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _continued(self, said: str) -> tuple[int, ...]:
        """The tokens of what the guard says, behind its prompt.

        They are read off the tokens of prompt and words together. Where the words would merge with the end of
        the prompt (a newline behind a newline), which a model that generates cannot do, they stand alone.
        """
        before, both = self._plain_ids(self._frame), self._plain_ids(self._frame + said)
        return both[len(before) :] if both[: len(before)] == before else self._plain_ids(said)

    @cached_property
    def _frame(self) -> str:
        """The guard's text about a sample answer: what follows the answer is the same for all."""
        text = self._renderers()[0]("a", "b")
        if text.endswith("b"):
            raise UserError(f"{self._name}: its template ends with the answer. Expected a question after it.")
        return text

    @cached_property
    def _prefix(self) -> tuple[str | tuple[str, ...], ...]:
        """What the guard says first, without white space that its template ends with anyway."""
        pieces = self.format.answer_prefix
        blank = pieces and isinstance(pieces[0], str) and pieces[0].isspace()
        return pieces[1:] if blank and self._frame.endswith(pieces[0]) else pieces

    def _first_tokens(self, said: Sequence[str], words: Sequence[str]) -> tuple[int, ...]:
        """The first token of each word after what was said, every token once."""
        before = self._continued("".join(said))
        tokens = []
        for word in words:
            both = self._continued("".join(said) + word)
            if not word or len(both) <= len(before) or both[: len(before)] != before:
                raise UserError(
                    f"{self._name}: the answer word {word!r} merges with the text before it, {''.join(said)!r}. "
                    f"Move the space between them into the word: {' ' + word.strip()!r}."
                )
            tokens.append(both[len(before)])
        return tuple(dict.fromkeys(tokens))

    def _said(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """What the guard says before its word, choices made by the guard itself."""
        said: list[str] = []
        for piece in self._prefix:
            if isinstance(piece, str):
                said.append(piece)
                continue
            first = [self._first_tokens(said, [word])[0] for word in piece]
            here = torch.tensor([ids + self._continued("".join(said))], device=self.device)
            with torch.no_grad():
                logits = self._logits(self.embedding()(here), torch.ones_like(here), None)[0]
            said.append(piece[int(logits[first].argmax())])
        return self._continued("".join(said)) if said else ()

    def _logits(self, embeds: Tensor, mask: Tensor, types: Tensor | None) -> Float[Tensor, "readings outputs"]:
        """Logits of the words behind the last attended token, or of the labels."""
        weight = self.embedding().weight
        embeds, mask = embeds.to(weight.device, weight.dtype), mask.to(weight.device)
        options: dict[str, Any] = {"token_type_ids": types} if types is not None else {}
        causal = self.format.kind == "causal"
        head = self.model.get_output_embeddings() if causal else getattr(self.model, "score", None)
        if head is not None:  # it reads the last token: hand it those rows alone
            options["use_cache"] = False
        with last_rows(head, mask), _quiet():  # some classifiers warn of padding, which the rows take care of
            logits = self.model(inputs_embeds=embeds, attention_mask=mask, **options).logits
        logits = logits[:, 0] if causal else logits
        return logits if logits.dtype == torch.float64 else logits.float()


def load_guard(
    name: str,
    *,
    format: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    remote_code: bool = False,
    safe_only: bool = False,
) -> Guard:
    """Load a guard from a folder or a hub id.

    Args:
        name: folder as `save_pretrained` writes it, or hub id.
        format: name of a known format, or a file that declares one. None: the folder's guard.json, else the
            known guard that the model is recognised as, else, for a sequence classifier, the pair (prompt,
            response).
        dtype: "float32", "bfloat16", "float16", "float64", or "auto": what the machine computes fastest in.
        device: a torch device, or "auto".
        revision: commit or branch of a hub model.
        remote_code: run Python code that comes with the model. Off unless the user asks.
        safe_only: S is the logit of safe alone, as in the paper.

    Raises:
        UserError: the model cannot be loaded or lacks weights; no format is known for it, or it does not fit.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown. Expected auto or one of: {', '.join(DTYPES)}.")
    chosen = find_format(format) if format is not None else None
    place = machine_device() if device == "auto" else device
    kind = machine_dtype(place) if dtype == "auto" else DTYPES[dtype]
    options = {"revision": revision, "trust_remote_code": remote_code}
    where = _locate(name)
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(where, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
            chosen = chosen or declared_format(where) or format_of(name, config, tokenizer)
            loader = _LOADERS[chosen.kind]
            model, info = loader.from_pretrained(
                where, dtype=kind, use_safetensors=True, output_loading_info=True, **options
            )
            model.to(place)
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"{name}: the guard cannot be loaded ({reason}). Expected a folder with config.json, "
                "tokenizer and safetensors weights of a causal model or sequence classifier, or a hub id."
            ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{name}: no weights for {missing[0]}, so it is no trained {chosen.kind} guard. Expected a model "
            "whose head was trained; the other kind is declared in a format file (kind causal or classifier)."
        )
    source = {"name": name, "revision": revision or "", "dtype": str(kind).removeprefix("torch.")}
    return assemble(model, tokenizer, chosen, source, safe_only=safe_only)


def assemble(
    model: Any, tokenizer: Any, format: GuardFormat, source: Mapping[str, str], *, safe_only: bool = False
) -> Guard:
    """A guard of a loaded model and its tokenizer, found to fit together.

    Raises:
        UserError: no fast tokenizer, or the format does not fit.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{source['name']}: has no fast tokenizer, which tells the place of a token in the text.")
    if model.config.get_text_config().pad_token_id is None:  # some classifiers refuse batches without one
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id or 0
    named = {**source, "format": format.name}
    guard = Guard(model.eval().requires_grad_(False), tokenizer, format, named, safe_only)
    guard.check()
    return guard


_LOADERS = {
    "causal": transformers.AutoModelForCausalLM,
    "classifier": transformers.AutoModelForSequenceClassification,
}


def declared_format(where: str) -> GuardFormat | None:
    """The format in a model folder's guard.json; None without such a file."""
    path = Path(where) / DECLARATION
    return find_format(path) if path.is_file() else None


def format_of(name: str, config: Any, tokenizer: Any) -> GuardFormat:
    """The format of a model for which none was given.

    Raises:
        UserError: not a known guard, and not a classifier either.
    """
    if any(built.endswith("ForSequenceClassification") for built in config.architectures or ()):
        return PAIR_CLASSIFIER
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    if known := recognise([name, config.name_or_path], template):
        return known
    raise UserError(
        f"{name}: is none of the guards known here, so how to ask it is unknown. Give its format: a file "
        f"(docs/guards.md) or one of: {', '.join(sorted(KNOWN))}."
    )


@dataclass(frozen=True)
class Place:
    """Where the answer stands in a text: characters [start, end), without its first `skipped` characters."""

    start: int
    end: int
    skipped: int

    def span(self, start: int, end: int, origin: Sequence[int]) -> tuple[int, int] | None:
        """Characters of the original answer under characters [start, end) of the text; None for none."""
        first, last = max(start, self.start), min(end, self.end)
        if first >= last:
            return None
        shift = self.skipped - self.start
        under = [at for at in origin[first + shift : last + shift] if at >= 0]
        return (under[0], under[-1] + 1) if under else None


def place(render: Render, prompt: str, response: str) -> tuple[str, Place | None]:
    """The rendered text and where in it the answer stands; None where the template does not show the answer.

    The template is rendered with a marker for the answer too: what stands before and after the marker must
    stand before and after the answer, which gives the place whatever the request or answer looks like.

    Raises:
        Unreadable: the template alters the answer by more than stripping it, or itself with the answer.
        UserError: it shows the answer more than once.
    """
    text = render(prompt, response)
    marker = _marker(prompt + response)
    marked = render(prompt, marker)
    shown = marked.count(marker)
    if not shown:
        return text, None
    if shown > 1:
        raise UserError(f"the guard's template shows the answer {shown} times. Expected once.")
    before, _, after = marked.partition(marker)
    inside = text[len(before) : len(text) - len(after)]
    lead = len(response) - len(response.lstrip())
    stripped = {response.lstrip(): lead, response.strip(): lead, response.rstrip(): 0, response: 0}
    if before + inside + after == text and inside in stripped:
        return text, Place(len(before), len(before) + len(inside), stripped[inside])
    raise Unreadable("the guard's template changes with the answer, so the place of its characters is lost.")


def break_words(text: str, words: Sequence[str]) -> tuple[str, Sequence[int]]:
    """`text` with a space after the first character of every one of `words` in it.

    Returns:
        The text, and for each of its characters the position in the old text; -1 for a space put in.
    """
    if not any(word in text for word in words):
        return text, range(len(text))
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    inserted = {match.start() + 1 for match in re.finditer(pattern, text)}
    made, origin = [], []
    for at, character in enumerate(text):
        if at in inserted:
            made.append(" ")
            origin.append(-1)
        made.append(character)
        origin.append(at)
    return "".join(made), origin


def fill(template: str, prompt: str, response: str) -> str:
    """A jinja text with `prompt` and `response` put in. Their own text is never read as template.

    Raises:
        UserError: the template is not jinja or names other variables.
    """
    try:
        return _compiled(template).render(prompt=prompt, response=response)
    except TemplateError as error:
        raise UserError(
            f"guard template {template[:40]!r}: {error}. Expected jinja with variables prompt and response."
        ) from error


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template)


def label_sides(config: Any, format: GuardFormat, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of a classifier's safe and unsafe labels, declared or told by their names.

    Raises:
        UserError: a declared label that the model does not have, or names that tell nothing.
    """
    labels = {int(number): str(label) for number, label in config.id2label.items()}
    plain = {number: re.sub(r"[\s_/-]+", " ", label).strip().lower() for number, label in labels.items()}
    listed = ", ".join(labels[number] for number in sorted(labels))
    independent = len(labels) == 1 or config.problem_type == "multi_label_classification"
    way_out = 'Say it in a format file: {"kind": "classifier", "safe_labels": [...]} (docs/guards.md).'
    sides: dict[str, tuple[int, ...]] = {}
    for side, given in (("safe", format.safe_labels), ("unsafe", format.unsafe_labels)):
        wanted = [re.sub(r"[\s_/-]+", " ", label).strip().lower() for label in given]
        if absent := [label for label, word in zip(given, wanted, strict=True) if word not in plain.values()]:
            raise UserError(f"{name}: has no label {absent[0]!r}; its labels are: {listed}.")
        sides[side] = tuple(number for number in sorted(plain) if plain[number] in wanted)
    if not format.safe_labels and not format.unsafe_labels:
        sides = {
            "safe": tuple(number for number in sorted(plain) if plain[number] in SAFE_LABELS),
            "unsafe": tuple(number for number in sorted(plain) if plain[number] in UNSAFE_LABELS),
        }
        if len(sides["safe"]) + len(sides["unsafe"]) < len(labels):
            raise UserError(f"{name}: nothing says which of its labels mean safe: {listed}. {way_out}")
    elif not independent:  # one side is declared: the rest is the other
        rest = tuple(number for number in sorted(labels) if number not in sides["safe"] + sides["unsafe"])
        sides = {side: numbers or rest for side, numbers in sides.items()}
    if set(sides["safe"]) & set(sides["unsafe"]):
        raise UserError(f"{name}: a label is declared both safe and unsafe; its labels are: {listed}.")
    if not independent and not (sides["safe"] and sides["unsafe"]):
        raise UserError(f"{name}: all its labels ({listed}) are of one side, so they tell nothing. {way_out}")
    return sides["safe"], sides["unsafe"]


@contextmanager
def last_rows(head: nn.Module | None, mask: Int[Tensor, "readings width"]) -> Iterator[None]:
    """Inside this block a head gets the last attended position of each row alone: (readings, 1, hidden)."""
    if head is None:
        yield
        return
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        rows = torch.arange(len(hidden), device=hidden.device)
        return (hidden[rows, last.to(hidden.device)].unsqueeze(1), *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _side(logits: Float[Tensor, "readings outputs"], numbers: tuple[int, ...]) -> Float[Tensor, " readings"]:
    """logsumexp over some outputs; 0 over none."""
    return logits[:, list(numbers)].logsumexp(-1) if numbers else logits.new_zeros(len(logits))


def _marker(text: str) -> str:
    """Digits that do not occur in `text`; unlike letters, no filter of a template changes them."""
    while (marker := str(uuid.uuid4().int)) in text:
        pass
    return marker
