"""Random guards of every kind, with tokenizers trained on a few sentences."""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from keelweight.inputs.guard_formats import GuardFormat
from keelweight.inputs.guards import Guard
from tests.tiny import SENTENCES, TEMPLATE, norms_in_float64, tiny_chat

WORDS = ["safe unsafe safe unsafe", "yes no Yes No yes no Safe Unsafe", "Request: Answer: Verdict:"]
TEXT = GuardFormat(
    "text", template="Request: {{ prompt }}\nAnswer: {{ response }}\nVerdict:", safe=" safe", unsafe=" unsafe"
)
CHAT = GuardFormat("chat")
PAIR = GuardFormat("pair", "classifier")


def causal_guard(format: GuardFormat = TEXT, dtype: torch.dtype = torch.float32) -> Guard:
    """A random Llama with a byte-level tokenizer of its own."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    if dtype == torch.float64:
        norms_in_float64(model)
    return Guard(model, tokenizer, format, {"name": "tiny guard"})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the answer words in its vocabulary, and a chat template."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(SENTENCES + WORDS * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer with [CLS] and [SEP], as BERT's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    made.train_from_iterator(SENTENCES + WORDS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, made.token_to_id(word)) for word in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def classifier_guard(
    format: GuardFormat = PAIR,
    labels: tuple[str, ...] = ("unsafe", "safe"),
    dtype: torch.dtype = torch.float32,
    **config,
) -> Guard:
    """A random BERT classifier with a WordPiece tokenizer."""
    tokenizer = wordpiece_tokenizer()
    torch.manual_seed(5)
    made = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.3,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        **config,
    )
    model = BertForSequenceClassification(made).to(dtype).eval().requires_grad_(False)
    return Guard(model, tokenizer, format, {"name": "tiny classifier"})


def decoder_classifier(labels: tuple[str, ...] = ("unsafe", "safe")) -> Guard:
    """A random Llama with a classification head that reads the last token."""
    tokenizer = tiny_chat().tokenizer
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    model = LlamaForSequenceClassification(config).eval().requires_grad_(False)
    format = GuardFormat("text", "classifier", template="{{ prompt }}\n{{ response }}")
    return Guard(model, tokenizer, format, {"name": "tiny decoder"})


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: words begin with a lower block, unknown characters fall back to bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    special = ["<unk>", "<s>", "</s>", *bytes_]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    made.train_from_iterator(SENTENCES + WORDS, trainer)
    plain = json.loads(made.to_str())
    plain["added_tokens"] = plain["added_tokens"][:3]  # the bytes are ordinary tokens
    made = Tokenizer.from_str(json.dumps(plain))
    begin = [("<s>", made.token_to_id("<s>"))]
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
