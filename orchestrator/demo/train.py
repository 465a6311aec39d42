"""Train the bundled demo model on a CPU in under twenty minutes.

    python -m moesaic.orchestrator.demo.train --output build/demo --minutes 18 --seed 0

and, in under an hour, a larger one of 15.7 million parameters for comparisons of expert methods:

    python -m moesaic.orchestrator.demo.train --size large --output build/large --minutes 55

Each leaves ``model/`` (an ordinary Qwen3-MoE checkpoint in bfloat16, with its own tokenizer) and
``text/`` (calibration and held-out text of each kind, with their licences) in the output folder.

The run takes ``--steps`` optimizer steps and is then reproducible from its seed on one kind of
machine. ``--minutes`` is a ceiling: where the machine is too slow for the steps, the schedule
follows the clock instead and the script says so.

The load-balancing loss is taken per layer. Pooled over layers, as in ``transformers``, it lets one
layer's idle experts hide behind another layer's busy ones. Arithmetic is float32: at these small
shapes bfloat16 saves nothing on a CPU; only the checkpoint is rounded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Two OpenMP threads that spin while another process wants the core slow each other down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moesaic.orchestrator.demo.corpus import Split, licences, load_splits  # noqa: E402

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1536
SEQUENCE = 256  # tokens per training window and per evaluation window
MIXTURE = {"prose": 0.4, "code": 0.4, "multilingual": 0.2}  # share of the training windows
REPEATS = {"prose": 1, "code": 1, "multilingual": 3}  # of each text when merges are counted
BALANCE_WEIGHT = 0.01
ROUTER_Z_WEIGHT = 1e-3


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE vocabulary of ``VOCABULARY`` entries; any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=2 * SEQUENCE,
    )


# Demo: four layers, sixteen experts each, two per token. Large: six, thirty-two, four.
SHAPES: dict[str, dict[str, int]] = {
    "demo": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "moe_intermediate_size": 64,
        "num_experts": 16,
        "num_experts_per_tok": 2,
    },
    "large": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "moe_intermediate_size": 96,
        "num_experts": 32,
        "num_experts_per_tok": 4,
    },
}


def build_config(size: str) -> Qwen3MoeConfig:
    """Return the shape of the model called ``size``."""
    shape = SHAPES[size]
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        **shape,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=shape["moe_intermediate_size"],  # of dense layers: there are none
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=2 * SEQUENCE,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def router_losses(
    router_logits: Sequence[torch.Tensor], top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the load-balancing loss and the router z-loss, each the mean over layers.

    Balance of one layer: E · Σ_e (share of assignments to e) · (mean probability of e), which is 1
    where the load is even (Switch Transformer, section 2.2). ``router_logits``: [T, E] per layer.
    """
    balance, z_loss = [], []
    for logits in router_logits:
        logits = logits.float()
        probabilities = logits.softmax(dim=-1)
        experts = logits.shape[-1]
        chosen = probabilities.topk(top_k, dim=-1).indices.reshape(-1)
        share = torch.bincount(chosen, minlength=experts) / chosen.numel()
        balance.append(experts * (share * probabilities.mean(dim=0)).sum())
        z_loss.append(logits.logsumexp(dim=-1).square().mean())
    return torch.stack(balance).mean(), torch.stack(z_loss).mean()


def learning_rate_factor(progress: float, warmup: float = 0.03, floor: float = 0.02) -> float:
    """Linear warm-up, then a cosine down to ``floor``; ``progress`` runs from 0 to 1."""
    if progress < warmup:
        return progress / warmup
    position = (progress - warmup) / (1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(position, 1.0)))


class Windows:
    """Random windows of the training streams, drawn from the kinds in the shares of ``MIXTURE``."""

    def __init__(self, streams: dict[str, torch.Tensor], seed: int) -> None:
        self.streams = [streams[kind] for kind in MIXTURE]
        self.shares = torch.tensor(list(MIXTURE.values()))
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, batch: int) -> torch.Tensor:
        """Return [batch, SEQUENCE + 1] token ids."""
        kinds = torch.multinomial(self.shares, batch, replacement=True, generator=self.generator)
        windows = []
        for kind in kinds.tolist():
            stream = self.streams[kind]
            last = stream.numel() - SEQUENCE - 1
            start = int(torch.randint(last, (1,), generator=self.generator))
            windows.append(stream[start : start + SEQUENCE + 1])
        return torch.stack(windows)


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> torch.Tensor:
    """Return one stream of token ids with an end-of-text token after every document."""
    ids: list[int] = []
    for encoded in tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]:
        ids += [*encoded, 0]
    return torch.tensor(ids)


def train(
    model: Qwen3MoeForCausalLM,
    windows: Windows,
    *,
    steps: int,
    minutes: float,
    batch: int,
    learning_rate: float,
    console: Console,
) -> int:
    """Train in place; return the number of steps taken (fewer than ``steps`` if time ran out)."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"))
    model.train()
    model.set_experts_implementation("grouped_mm")
    started = time.perf_counter()
    step, by_clock, smoothed = 0, False, math.log(VOCABULARY)
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=1.0)
        while True:
            elapsed = (time.perf_counter() - started) / (60 * minutes)
            by_clock = by_clock or (step > 20 and elapsed > step / steps)
            progress = max(step / steps, elapsed) if by_clock else step / steps
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * learning_rate_factor(progress)
            ids = windows.draw(batch)
            outputs = model(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
            loss = F.cross_entropy(outputs.logits.flatten(0, 1), ids[:, 1:].flatten())
            balance, z_loss = router_losses(outputs.router_logits, model.config.num_experts_per_tok)
            total = loss + BALANCE_WEIGHT * balance + ROUTER_Z_WEIGHT * z_loss
            torch.autograd.backward(total)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            smoothed += 0.05 * (loss.item() - smoothed)
            step += 1
            text = f"step {step}/{steps}  loss {smoothed:.3f}  balance {balance.item():.3f}"
            bar.update(task, completed=progress, description=text)
            if not console.is_terminal and step % 100 == 0:
                console.print(f"{text}  {time.perf_counter() - started:.0f} s")
    if by_clock:
        console.print(
            f"note: {steps} steps would have taken longer than {minutes:g} minutes; stopped after"
            f" {step} by the clock, so this run is not reproducible to the bit"
        )
    return step


@torch.no_grad()
def heldout_report(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str
) -> tuple[float, float, torch.Tensor]:
    """Return perplexity per token, bits per byte, and expert loads [layers, experts] (shares)."""
    ids = encode_documents(tokenizer, [text])
    count = (ids.numel() - 1) // SEQUENCE
    inputs = ids[: count * SEQUENCE].view(count, SEQUENCE)
    targets = ids[1 : count * SEQUENCE + 1].view(count, SEQUENCE)
    model.eval()
    nats = 0.0
    loads = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for rows, wanted in zip(torch.split(inputs, 16), torch.split(targets, 16), strict=True):
        outputs = model(input_ids=rows, output_router_logits=True, use_cache=False)
        logits = outputs.logits.float().flatten(0, 1)
        nats += F.cross_entropy(logits, wanted.flatten(), reduction="sum").item()
        for layer, router in enumerate(outputs.router_logits):
            chosen = router.topk(model.config.num_experts_per_tok, dim=-1).indices
            loads[layer] += torch.bincount(chosen.flatten(), minlength=loads.shape[1])
    size = len(tokenizer.decode(ids[1 : count * SEQUENCE + 1].tolist()).encode())
    mean = nats / targets.numel()
    return math.exp(mean), nats / math.log(2) / size, loads / loads.sum(dim=1, keepdim=True)


def write_texts(output: Path, splits: dict[str, Split], downloads: Path) -> None:
    """Write the calibration and held-out texts, and the licences they come under."""
    folder = output / "text"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, split in splits.items():
        (folder / f"calibration.{kind}.txt").write_text(split.calibration, "utf-8")
        (folder / f"heldout.{kind}.txt").write_text(split.heldout, "utf-8")
    for source, text in licences(downloads).items():
        (folder / f"LICENSE.{source}").write_text(text, "utf-8")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled demo model.")
    parser.add_argument("--size", choices=list(SHAPES), default="demo")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--minutes", type=float, default=18.0, help="ceiling of the training time")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {SEQUENCE} tokens")
    parser.add_argument("--learning-rate", type=float, default=8e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--downloads", type=Path, default=Path("build/downloads"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch the texts, train tokenizer and model, save, and report on the saved checkpoint."""
    options = parse_arguments(arguments)
    console = Console(stderr=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    splits = load_splits(options.downloads)
    write_texts(options.output, splits, options.downloads)
    tokenizer = build_tokenizer(
        [text for kind, split in splits.items() for text in split.train * REPEATS[kind]]
    )
    streams = {kind: encode_documents(tokenizer, split.train) for kind, split in splits.items()}
    model = Qwen3MoeForCausalLM(build_config(options.size))
    for kind, stream in streams.items():
        console.print(f"{kind}: {stream.numel():,} training tokens")
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

    started = time.perf_counter()
    steps = train(
        model,
        Windows(streams, options.seed),
        steps=options.steps,
        minutes=options.minutes,
        batch=options.batch,
        learning_rate=options.learning_rate,
        console=console,
    )
    seconds = time.perf_counter() - started

    folder = options.output / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = Qwen3MoeForCausalLM.from_pretrained(folder)
    report: dict[str, Any] = {"steps": steps, "seconds": round(seconds), "kinds": {}}
    loads = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for kind, split in splits.items():
        perplexity, bits_per_byte, shares = heldout_report(saved, tokenizer, split.heldout)
        loads += shares / len(splits)
        report["kinds"][kind] = {
            "perplexity": round(perplexity, 3),
            "bits_per_byte": round(bits_per_byte, 4),
        }
    even = 1 / loads.shape[1]
    report["load_over_even_share"] = [
        {"min": round(layer.min().item() / even, 3), "max": round(layer.max().item() / even, 3)}
        for layer in loads
    ]
    report["bytes"] = sum(p.stat().st_size for p in options.output.rglob("*") if p.is_file())
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
