# SPDX-License-Identifier: Apache-2.0
"""Trains the bundled model, `serving_examples/tiny_qwen3_moe`, and measures it.

    python serving_examples/python_corpus.py -o build/corpus
    python serving_examples/train_tiny_qwen3_moe.py --corpus build/corpus -o build/tiny_qwen3_moe
    python serving_examples/train_tiny_qwen3_moe.py --corpus build/corpus -o build/tiny_qwen3_moe --measure

A Qwen3-MoE of 9 M parameters, seeded; 40 minutes on two cores with AVX-512 bf16, minutes on a GPU. On a CPU start it
with GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SEED, VOCAB, CONTEXT, END = 0, 4096, 512, "<|endoftext|>"
BALANCE, PEAK_LR, FINAL_LR, WARMUP = 0.02, 3e-3, 1e-4, 200
ROW_MULTIPLE = 128  # oneDNN compiles a primitive for every new shape: pad the rows of an expert to few sizes


def documents(path: Path) -> Iterator[str]:
    with path.open() as lines:
        yield from (json.loads(line)["text"] for line in lines)


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(itertools.islice(documents(corpus / "train.jsonl"), 1500), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=CONTEXT)


def token_blocks(tokenizer: PreTrainedTokenizerFast, path: Path, num_blocks: int) -> torch.Tensor:
    """The first `num_blocks` blocks of CONTEXT tokens of the documents joined by END, int64 [N, CONTEXT]."""
    ids: list[int] = []
    for text in documents(path):
        ids += tokenizer(text, verbose=False).input_ids + [tokenizer.eos_token_id]
        if len(ids) >= num_blocks * CONTEXT:
            break
    usable = len(ids) // CONTEXT * CONTEXT
    return torch.tensor(ids[:usable]).view(-1, CONTEXT)[:num_blocks]


def padded_experts(
    self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts as two batched matmuls over rows padded to the fullest expert (training only)."""
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=self.num_experts)
    capacity = -(-int(counts.max()) // ROW_MULTIPLE) * ROW_MULTIPLE
    slot = torch.arange(len(flat)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    position = torch.empty_like(order).scatter_(0, order, flat[order] * capacity + slot)
    rows = hidden_states.new_zeros(self.num_experts * capacity, hidden_states.shape[-1])
    rows = rows.index_copy(0, position, hidden_states.repeat_interleave(top_k_index.shape[1], 0))
    gate, up = torch.bmm(rows.view(self.num_experts, capacity, -1), self.gate_up_proj.mT).chunk(2, -1)
    out = torch.bmm(F.silu(gate) * up, self.down_proj.mT).flatten(0, 1)
    return (out[position].view(*top_k_index.shape, -1) * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch Transformer's loss, layer by layer (transformers pools the layers, which lets each be skewed)."""
    losses = []
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        chosen = probs.topk(top_k, -1).indices.flatten().bincount(minlength=probs.shape[-1]) / len(probs)
        losses.append(probs.shape[-1] * (chosen / top_k * probs.mean(0)).sum())
    return torch.stack(losses).mean()


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    return FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # ty: ignore[unknown-argument]  # the config takes more than it declares
        num_experts=24,
        num_experts_per_tok=4,
        moe_intermediate_size=96,
        intermediate_size=384,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,  # ty: ignore[unknown-argument]
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def train(corpus: Path, output: Path, steps: int, batch_size: int, device: str) -> None:
    torch.manual_seed(SEED)
    ALL_EXPERTS_FUNCTIONS.register("padded", padded_experts)
    tokenizer = train_tokenizer(corpus)
    blocks = token_blocks(tokenizer, corpus / "train.jsonl", steps * batch_size)
    order = torch.cat([torch.randperm(len(blocks)) for _ in range(-(-steps * batch_size // len(blocks)))])
    model = build_model(tokenizer).to(device).train()
    model.set_experts_implementation("padded")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        fused=True,
    )
    start = time.time()
    for step in range(steps):
        ids = blocks[order[step * batch_size : (step + 1) * batch_size]].to(device)
        with torch.autocast(device, torch.bfloat16):
            out = model(ids, output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        total = loss + BALANCE * load_balancing_loss(out.router_logits, model.config.num_experts_per_tok)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            rate = (step + 1) * ids.numel() / (time.time() - start)
            print(f"step {step}/{steps} loss {loss:.3f} {rate:.0f} tok/s", flush=True)
        if step % 250 == 249 or step == steps - 1:
            save(model, tokenizer, output)


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.config.dtype = torch.bfloat16
    model.config._experts_implementation = None
    model.save_pretrained(output, state_dict=state)
    tokenizer.save_pretrained(output)
    model.set_experts_implementation("padded")


@torch.no_grad()
def measure(corpus: Path, model_dir: Path, num_blocks: int) -> dict[str, float]:
    """Held-out perplexity in fp32 and the least used expert's share of tokens relative to uniform."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    model = Qwen3MoeForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    blocks = token_blocks(tokenizer, corpus / "held_out.jsonl", num_blocks)
    config = model.config
    nll, counts = 0.0, torch.zeros(config.num_hidden_layers, config.num_experts)
    for ids in blocks.split(8):
        out = model(ids, output_router_logits=True)
        nll += F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        for layer, logits in enumerate(out.router_logits):
            top = logits.topk(config.num_experts_per_tok, -1).indices.flatten()
            counts[layer] += top.bincount(minlength=config.num_experts)
    share = counts / counts.sum(1, keepdim=True) * config.num_experts
    return {
        "perplexity": math.exp(nll / (len(blocks) * (CONTEXT - 1))),
        "tokens": blocks.numel(),
        "least_expert_share": share.min().item(),
        "most_expert_share": share.max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by python_corpus.py")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 512 tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", action="store_true", help="only measure the model in --output")
    parser.add_argument("--num-blocks", type=int, default=400, help="held-out blocks of 512 tokens to measure on")
    args = parser.parse_args()
    if not args.measure:
        train(args.corpus, args.output, args.steps, args.batch_size, args.device)
    print(json.dumps(measure(args.corpus, args.output, args.num_blocks), indent=2))


if __name__ == "__main__":
    main()
