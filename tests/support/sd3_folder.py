"""Tiny random models in the published layout of Stable Diffusion 3.5, tokenizers included."""

import json

import reference

from diffjax import weights
from diffjax.nets.clip import ClipText
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.t5 import T5Encoder
from diffjax.nets.vae import AutoencoderKL
from diffjax.utils import files
from diffjax.weights.scheduler import FlowScheduler, write_scheduler

CLIP = dict(
    vocab_size=517, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=77
)
MMDIT = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=20,
    pos_embed_max_size=12,
)
NETWORKS = {
    "text_encoder": ClipText(hidden_size=8, projection_dim=8, hidden_act="quick_gelu", **CLIP),
    "text_encoder_2": ClipText(hidden_size=16, projection_dim=12, hidden_act="gelu", **CLIP),
    "text_encoder_3": T5Encoder(vocab_size=200, d_model=32, d_kv=8, d_ff=16, num_layers=2, num_heads=2),
    "vae": AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16
    ),
}
TRANSFORMERS = {"large": MMDiT(**MMDIT), "medium": MMDiT(**MMDIT, dual_attention_layers=(0, 1))}
LIBRARIES = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5Tokenizer"),
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def write(folder, kind="large", t5=True):
    """A pipeline's folder with random weights, written by ourselves."""
    for seed, (name, module) in enumerate({**NETWORKS, "transformer": TRANSFORMERS[kind]}.items()):
        if name != "text_encoder_3" or t5:
            form = weights._format_of(module)
            weights.save(
                folder / name, module, reference.params(form, module, reference.checkpoint(form, module, seed))
            )
    write_scheduler(folder, FlowScheduler(shift=3.0))
    write_clip_rules(folder / "tokenizer", pad="<|endoftext|>")
    write_clip_rules(folder / "tokenizer_2")
    left_out = () if t5 else ("text_encoder_3", "tokenizer_3")
    if t5:
        write_t5_rules(folder / "tokenizer_3")
    index = {name: [None, None] if name in left_out else list(where) for name, where in LIBRARIES.items()}
    files.write_json(folder / "model_index.json", {"_class_name": "StableDiffusion3Pipeline", **index})
    return folder


def write_clip_rules(folder, pad="!"):
    """CLIP's tokenizer with the 256 bytes, each also as a word's end, and three merges."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(i) for i in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = letters + [f"{letter}</w>" for letter in letters] + ["ca", "cat</w>", "it</w>"]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\ni t</w>\n")
    token = lambda text: {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    config = {
        "added_tokens_decoder": {
            "0": token("!"),
            str(len(words)): token("<|startoftext|>") | {"normalized": True},
            str(len(words) + 1): token("<|endoftext|>"),
        },
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": 77,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_t5_rules(folder):
    """A sentencepiece model of 60 pieces with T5's special ids."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat and a hat, it is 12 o'clock", "the cat's bat sat on the mat!"] * 4),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    return folder
