"""Tiny models of random weights, in folders as diffusers and transformers have them."""

from __future__ import annotations

import torch


def save_models(root):
    """Folders below root of a VAE (with a shift), and of a CLIP and a T5 text model with their tokenizers."""
    from diffusers import AutoencoderKL
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.7,
        shift_factor=0.3,
    ).save_pretrained(root / "vae")
    words = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", "a", "red", "blue", "cat", "dog"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", model_max_length=6
    )
    sizes = {"vocab_size": 8, "eos_token_id": 1, "pad_token_id": 0}
    clip = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=6,
        **sizes,
    )
    CLIPTextModel(clip).save_pretrained(root / "pipeline" / "text_encoder")
    fast.save_pretrained(root / "pipeline" / "tokenizer")
    T5EncoderModel(T5Config(d_model=12, d_kv=4, d_ff=8, num_layers=2, num_heads=3, **sizes)).save_pretrained(
        root / "t5"
    )
    fast.save_pretrained(root / "t5")
    return root
