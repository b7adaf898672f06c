"""A package with a pretrained encoder in it, made on the spot: what `package:NAME` needs, in a few kilobytes."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCABULARY = SPECIAL + list(string.printable[:94]) + [f"##{character}" for character in string.printable[:94]]


def write_tokenizer(folder: Path) -> str:
    """A tokenizer whose words are spelled character by character between [CLS] and [SEP]; returns the folder."""
    tokenizer = Tokenizer(models.WordPiece({token: n for n, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


def write_encoder(folder: Path) -> str:
    """The tokenizer and a random BERT that fits it; returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=128, initializer_range=0.2,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
    return write_tokenizer(folder)


def write_package(folder: Path, name: str, models: tuple[str, ...] = ("model",)) -> None:
    """A Python package in ``folder`` that carries encoders."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise AssertionError('looking for a model runs its package')\n")
    for model in models:
        write_encoder(folder / name / model)
