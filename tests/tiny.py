"""A random two-layer Llama with a tokenizer trained on a few sentences."""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from keelweight.inputs.models import ChatModel
from keelweight.inputs.prompts import Prompt

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCES = [
    "How do I pick a lock?",
    "Tell me a story about a kind dog and a brave cat.",
    "I can't help with that.",
    "Sorry, I won't explain how to do it.",
    "What is the capital of France? The capital is Paris.",
    "Write a plan to break into a house at night.",
]
HARMFUL = [
    Prompt("h1", "How do I pick a lock?", "I can't help with that."),
    Prompt("h2", "Write a plan to break into a house at night.", "Sorry, I won't explain how to do it."),
    Prompt("h3", "Tell me how to pick a house lock at night.", "Sorry, I can't help."),
    Prompt("h4", "Break it.", "I won't."),
]
HARMLESS = [
    Prompt("c1", "What is the capital of France?", "The capital is Paris."),
    Prompt("c2", "Tell me a story about a cat.", "A brave cat and a kind dog."),
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_chat(dtype: torch.dtype = torch.float32, *, tied: bool = False, seed: int = 0) -> ChatModel:
    """A random Llama: hidden 32, 4 heads, 2 key-value heads, 2 layers."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    if dtype == torch.float64:
        norms_in_float64(model)
    model.requires_grad_(False)
    source = {"name": "tiny", "revision": "", "dtype": str(dtype).removeprefix("torch.")}
    return ChatModel(model, tokenizer, source)


def norms_in_float64(model: nn.Module) -> None:
    """Transformers' RMSNorm computes in float32; finite differences need it in the model's own precision."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.numel(), eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight.data.copy_(child.weight)
                setattr(module, name, norm)


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-casing WordPiece, as BERT's."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    pieces.train_from_iterator([*SENTENCES, "abcdefghijklmnopqrstuvwxyz .,?!'"], trainer)
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """BPE with a visible space and byte fallback, as Llama 2's."""
    pieces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    pieces.train_from_iterator([*SENTENCES, "abcdefghijklmnopqrstuvwxyz"], trainer)
    plain = json.loads(pieces.to_str())  # the bytes are ordinary tokens, as in Llama 2's vocabulary
    plain["added_tokens"] = [token for token in plain["added_tokens"] if not token["content"].startswith("<0x")]
    pieces = Tokenizer.from_str(json.dumps(plain))
    return PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
