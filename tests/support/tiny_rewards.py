"""Folders of tiny reward models with random weights, one of each layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rollouts.config import ScorerConfig
from rollouts.text.tokenizer import ChatTokenizer, transformers_tokenizer
from rollouts.tinymath import model_dir

QUESTION = "Let a=70+33, b=a+49. Find b."
STEPS = ["a=70+33=103\n\n", "b=a+49=103+49=151\nwhich is odd\n\n", "The answer is \\boxed{151}"]
_TEMPLATE = Path(__file__).parents[1] / "rollouts" / "text" / "templates" / "llama3_2.jinja"
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def make_reward_folder(layout: str, folder: Path) -> Path:
    """Make the folder of a model in a layout, as its authors' folders look, with its tokenizer."""
    import torch

    torch.manual_seed(7)
    getattr(_Folders, layout.replace("-", "_").replace(".", "_"))(folder)
    return folder


def scorer_config(layout: str, folder: Path, backend: str = "transformers", **more: Any) -> ScorerConfig:
    """Return the section [scorer] of such a model."""
    model = {"backend": backend, "model": str(folder), "dtype": "float32", "threads": 1}
    told = {} if layout in ("qwen2.5-math-prm", "skywork-o1") else {"layout": layout}
    return ScorerConfig.model_validate({"kind": "prm", "model": model, **told, **more})


def llama2_tokenizer() -> ChatTokenizer:
    """Return a tokenizer that is shaped as Llama 2's and Mistral's: blanks go together, across words."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    pairs = [("\u2581", "\u2581"), ("\u043a", "\u0438"), ("\u2581", "\u043a\u0438"), ("\u2581", "+"), ("\u2581", "-")]
    texts += ["\u043a", "\u0438", *map("".join, pairs)]
    vocabulary = {text: number for number, text in enumerate(texts)}
    backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return ChatTokenizer("llama", backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, None)


class _Folders:
    @staticmethod
    def skywork_o1(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import Qwen2Config

        from rollouts.models.hf.reward_model import ValueRewardModel

        tokenizer = transformers_tokenizer(str(model_dir("prm")))
        tokenizer.bos_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
        ValueRewardModel(Qwen2Config(vocab_size=len(tokenizer), **_SHAPE)).save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = torch.zeros(len(tokenizer), _SHAPE["hidden_size"])  # theirs have it, too
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForPrmModel"]}))

    @staticmethod
    def math_shepherd(folder: Path) -> None:
        from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

        vocabulary = Tokenizer(models.BPE(unk_token="<unk>"))
        vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace()]
        )
        letters = [chr(code) for code in range(32, 127)]
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=[*letters, "\n", "\u241e"]
        )
        text = ["Step 1: a = 7 + 3 \u043a\u0438\nStep 2: b - 4 \u043a\u0438\n + - \u043a\u0438"] * 9
        vocabulary.train_from_iterator(text, trainer)
        vocabulary.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=vocabulary, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        tokenizer.save_pretrained(folder)
        config = MistralConfig(vocab_size=len(tokenizer), sliding_window=None, **_SHAPE)
        MistralForCausalLM(config).save_pretrained(folder)

    @staticmethod
    def rlhflow(folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = transformers_tokenizer(str(model_dir("prm")))
        tokenizer.add_special_tokens({"additional_special_tokens": list(_LLAMA)})
        tokenizer.bos_token, tokenizer.eos_token = _LLAMA[0], _LLAMA[-1]
        tokenizer.chat_template = _TEMPLATE.read_text(encoding="utf-8")
        tokenizer.save_pretrained(folder)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **_SHAPE)).save_pretrained(folder)
