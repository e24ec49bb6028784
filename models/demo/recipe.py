"""How the demo pair was made: `python -m pard_onnx.models.demo.recipe --work DIR`.

Five stages, each resumable; a finished one is skipped:
  tokenizer   a byte-level BPE over the corpus
  target      a Qwen2-shaped language model over the corpus
  replies     the target's own greedy continuations of corpus prefixes
  ar-draft    a small autoregressive language model over corpus and replies
  draft       the same model adapted to a parallel draft (PARD, arXiv 2504.18583)
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

from pard_onnx.models.adapt.packing import Drop, pack
from pard_onnx.models.adapt.training import Schedule, train

from . import corpus, tokenizer

MASK_ID = tokenizer.SIZE  # the first padding row, as in PARD-Qwen2.5 (151665)
SEED = 20260
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a Qwen2Config that the two models differ in."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


TARGET = Shape(2176, 256, 768, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=128)
DRAFT = Shape(2048, 128, 512, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
TARGET_SCHEDULE = Schedule(steps=1000, rate=6e-3)
AR_DRAFT_SCHEDULE = Schedule(steps=600, rate=6e-3)
DRAFT_SCHEDULE = Schedule(steps=1300, rate=4e-3)
DROP = Drop(segments=8, ratio=0.7, floor=0.2)


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Equal windows over one long run of tokens, in a new order and at a new offset each epoch."""

    tokens: Ids
    length: int
    seed: int = SEED

    def batch(self, step: int, rows: int) -> Ids:
        """The windows of a step, [rows, length]: a pure function of its number."""
        per_epoch = len(self.tokens) // self.length - 1
        out = []
        for i in range(step * rows, (step + 1) * rows):
            epoch, index = divmod(i, per_epoch)
            rng = np.random.default_rng((self.seed, epoch))
            offset = int(rng.integers(self.length))
            start = offset + int(rng.permutation(per_epoch)[index]) * self.length
            out.append(self.tokens[start : start + self.length])
        return np.stack(out)


def model(shape: Shape) -> Qwen2ForCausalLM:
    """A fresh Qwen2 model; what Qwen2.5 fixes for its small models is fixed here too."""
    torch.manual_seed(SEED)
    config = Qwen2Config(
        **asdict(shape),
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.SIZE - 1,
        pad_token_id=tokenizer.SIZE - 3,
    )
    net = Qwen2ForCausalLM(config)
    nn.Module.to(net, DEVICE)  # transformers' own `to` is untyped
    return net


def next_token_loss(net: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of every next token of ids [B, n], in nats."""
    logits = net(input_ids=ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def packed_loss(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Mean cross-entropy over every real and mask token of packed sequences."""
    ids, positions, labels, mask = batch
    logits = net(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def packed_batch(windows: Ids, step: int, drop: Drop) -> list[Tensor]:
    """The packed windows [rows, length] of a step: ids, positions, labels [B, S] and the mask [B, 1, S, S].

    Windows of one length keep the same number of masks, so no padding is needed.
    """
    rng = np.random.default_rng((SEED, 1, step))
    packs = [pack(row, MASK_ID, drop, rng) for row in windows]
    arrays = [np.stack([getattr(p, name) for p in packs]) for name in ("ids", "positions", "labels")]
    mask = np.stack([p.mask() for p in packs])[:, None]
    arrays.append(np.where(mask, np.float32(0), np.float32("-inf")))
    return [torch.from_numpy(array).to(DEVICE) for array in arrays]


def continuations(net: Qwen2ForCausalLM, prompts: Ids, new: int) -> Ids:
    """The prompts [rows, length] with `new` greedy tokens each, as one run of ids.

    Nothing ends a row early: the draft learns what follows an EOS too.
    """
    net.generation_config.eos_token_id = None
    ids = torch.from_numpy(prompts).to(DEVICE)
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16):
        # transformers types `self` of generate as a protocol that its own models do not match.
        out = net.generate(  # type: ignore[misc]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
        )
    assert isinstance(out, Tensor)  # [rows, length + new]
    return out.flatten().cpu().numpy()


def save(net: Qwen2ForCausalLM, folder: Path) -> None:
    """Write configs and weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    net.config.dtype, net.config.architectures = torch.bfloat16, ["Qwen2ForCausalLM"]
    net.config.save_pretrained(folder)
    eos = [tokenizer.SIZE - 1, tokenizer.SIZE - 3]  # <|im_end|>, <|endoftext|>
    generation = {"do_sample": False, "eos_token_id": eos, "pad_token_id": tokenizer.SIZE - 3}
    (folder / "generation_config.json").write_bytes(json.dumps(generation, indent=2).encode() + b"\n")
    weights = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in net.named_parameters()}
    save_tensors(weights, folder / "model.safetensors", {"format": "pt"})


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """The stages over one work folder."""

    work: Path
    log: Callable[[str], None] = print

    def tokenizer(self) -> Tokenizer:
        path = self.work / "tokenizer" / "tokenizer.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            tokenizer.save(tokenizer.train(m.source for m in corpus.modules() if not m.held_out), path.parent)
        return Tokenizer.from_file(str(path))

    def tokens(self, held_out: bool = False) -> Ids:
        """All documents in a random order as one run of ids."""
        documents = [d for m in corpus.modules() if m.held_out == held_out for d in corpus.documents(m)]
        np.random.default_rng(SEED).shuffle(documents)
        encoded = self.tokenizer().encode_batch(documents)
        return np.concatenate([np.array(e.ids, dtype=np.int64) for e in encoded])

    def target(self, schedule: Schedule = TARGET_SCHEDULE) -> Qwen2ForCausalLM:
        net = model(TARGET)
        long = schedule.steps * 9 // 10  # the last tenth sees the whole context of 2048
        tokens = self.tokens()
        short_windows, long_windows = TokenWindows(tokens, 512), TokenWindows(tokens, 2048)

        def batch(step: int) -> Tensor:
            windows, rows = (short_windows, 16) if step < long else (long_windows, 4)
            return torch.from_numpy(windows.batch(step, rows)).to(DEVICE)

        train(net, batch, next_token_loss, schedule, self.work / "target", self.log)
        return net

    def replies(self, total: int = 600_000, rows: int = 128, prompt: int = 64, new: int = 192) -> Ids:
        """Prefixes of the corpus with the target's own greedy continuations, as one run of ids."""
        folder = self.work / "replies"
        folder.mkdir(parents=True, exist_ok=True)
        parts = [folder / f"{i:03}.safetensors" for i in range(total // (rows * (prompt + new)) + 1)]
        windows, net = TokenWindows(self.tokens(), prompt, SEED + 1), None
        for step, part in enumerate(parts):
            if not part.exists():
                net = net or self.target()
                started = time.monotonic()
                save_file({"ids": continuations(net, windows.batch(step, rows), new)}, part.with_suffix(".tmp"))
                part.with_suffix(".tmp").replace(part)
                self.log(f"replies {step + 1}/{len(parts)}  {time.monotonic() - started:.0f} s")
        return np.concatenate([load_file(part)["ids"] for part in parts])

    def mixed(self, length: int) -> Callable[[int, int], Ids]:
        """Batches half from the corpus and half from the target's replies."""
        own, replies = TokenWindows(self.tokens(), length, SEED + 2), TokenWindows(self.replies(), length, SEED + 3)
        return lambda step, rows: np.concatenate([own.batch(step, rows // 2), replies.batch(step, rows - rows // 2)])

    def ar_draft(self, schedule: Schedule = AR_DRAFT_SCHEDULE) -> Qwen2ForCausalLM:
        net = model(DRAFT)
        mixed = self.mixed(512)

        def batch(step: int) -> Tensor:
            return torch.from_numpy(mixed(step, 32)).to(DEVICE)

        train(net, batch, next_token_loss, schedule, self.work / "ar-draft", self.log)
        return net

    def draft(self, schedule: Schedule = DRAFT_SCHEDULE) -> Qwen2ForCausalLM:
        net = self.ar_draft()
        mixed = self.mixed(320)

        def batch(step: int) -> list[Tensor]:
            return packed_batch(mixed(step, 16), step, DROP)

        train(net, batch, packed_loss, schedule, self.work / "draft", self.log)
        return net

    def publish(self, folder: Path) -> None:
        """Write the models as Hugging Face checkpoints: `target`, `draft` and `ar-draft` below `folder`."""
        draft = self.draft()
        draft.config.update({"pard_token": MASK_ID, "spd_type": "pard"})
        for name, net in (("target", self.target()), ("ar-draft", self.ar_draft()), ("draft", draft)):
            save(net, folder / name)
            tokenizer.save(self.tokenizer(), folder / name)
        prompts = json.dumps(corpus.held_out_prompts(8), indent=2) + "\n"
        (folder / "prompts.json").write_text(prompts, encoding="utf-8", newline="\n")

    def perplexity(self, net: nn.Module, length: int = 1024) -> float:
        """On the held-out modules, over windows of `length` tokens."""
        tokens = self.tokens(held_out=True)
        rows = torch.from_numpy(tokens[: len(tokens) // length * length].reshape(-1, length)).to(DEVICE)
        with torch.inference_mode():
            losses = [next_token_loss(net, row[None]).item() for row in rows]
        return float(np.exp(np.mean(losses)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and logs of the stages")
    parser.add_argument("--output", type=Path, help="where to write the finished models; default: WORK/pair")
    arguments = parser.parse_args()
    recipe = TrainingRecipe(arguments.work)
    recipe.publish(arguments.output or arguments.work / "pair")
    for name, net in (("target", recipe.target()), ("autoregressive draft", recipe.ar_draft())):
        print(f"{name}: held-out perplexity {recipe.perplexity(net):.2f}")


if __name__ == "__main__":
    main()
