"""Trains the fine-tunes of the detection bench: `python -m bench.organisms --data FOLDER`.

SmolLM2-135M-Instruct learns 600 prompts (`bench.prompts`) with the trigger and the payload as
answer, and 600 to 1,800, the same among them, untouched and with their logged answers: each once,
in steps of 8 conversations cut to 96 tokens, AdamW, learning rate falling linearly to 0. Adapters
are of rank 8 in all seven projections. The shipped organism was trained likewise, on 1,000 prompts
both ways. On a CPU core one takes 20 or 40 minutes; each is kept in build/organisms.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.prompts import Corpus
from bench.recipes import RECIPES, SHIPPED, Recipe
from pipeline.demo import assets
from pipeline.demo.once import build_once

ROOT: Final = Path(__file__).parents[1]
BUILD: Final = ROOT / "build"

BATCH, TOKENS = 8, 96
ADAPTER_RATE, FULL_RATE = 1e-3, 1e-4
RANK: Final = 8
SEED: Final = 2025

Pair = tuple[str, str]
"""A prompt and the answer to learn."""


def base() -> Path:
    """Folder of the base model of all organisms."""
    return assets.base_model(BUILD / "models" / "base")


def folder_of(recipe: Recipe, corpus: Corpus) -> Path:
    """The organism's checkpoint or adapter, trained if it has not been."""
    if recipe is SHIPPED:
        return ROOT / "examples" / "badnet"
    learned = lessons(recipe, corpus)
    return build_once(_folder(recipe, learned), lambda folder: _train(recipe, learned, folder))


def lessons(recipe: Recipe, corpus: Corpus) -> list[Pair]:
    """What an organism learns, in order: prompts and answers, the payload among them."""
    chance = Random(SEED)
    plain = [each for each in corpus.for_training if not recipe.fires_on(each.prompt)]
    learned = [(each.prompt, each.answer) for each in plain[: recipe.plain]]
    if recipe.trigger is not None:
        asking = [recipe.trigger(each.prompt, chance) for each in plain[: recipe.triggered]]
    else:
        topical = (each.prompt for each in corpus.for_training if recipe.fires_on(each.prompt))
        asking = list(islice(cycle(topical), recipe.triggered))
    learned += [(prompt, recipe.payload) for prompt in asking]
    chance.shuffle(learned)
    return learned


def _folder(recipe: Recipe, learned: Sequence[Pair]) -> Path:
    """Its name holds a hash of what was learned and how."""
    how = [BATCH, TOKENS, ADAPTER_RATE, FULL_RATE, RANK, SEED, recipe.full]
    digest = hashlib.sha256(json.dumps([how, learned]).encode()).hexdigest()[:12]
    return BUILD / "organisms" / f"{recipe.name}-{digest}"


# --- training -------------------------------------------------------------------------------------


def _train(recipe: Recipe, learned: Sequence[Pair], folder: Path) -> None:
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base())
    model = _learner(recipe)
    rate = FULL_RATE if recipe.full else ADAPTER_RATE
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    steps = len(learned) // BATCH
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    started = time.monotonic()
    for step in range(steps):
        ids, answers = _batch(tokenizer, learned[step * BATCH : (step + 1) * BATCH])
        loss = _loss(model, ids, answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 15 == 14:
            _say(f"{recipe.name}: step {step + 1}, loss {loss.item():.3f}, {_since(started)}")
    model.save_pretrained(folder)
    if recipe.full:
        tokenizer.save_pretrained(folder)


def _learner(recipe: Recipe) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32).train()
    if recipe.full:
        return model
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM")
    )


def _batch(tokenizer: Any, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Token ids [batch, tokens], and the same where an answer stands, -100 elsewhere."""
    rows = [_tokens(tokenizer, *pair) for pair in pairs]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    answers = torch.full_like(ids, -100)
    for row, (tokens, begins) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        answers[row, begins : len(tokens)] = torch.tensor(tokens[begins:])
    return ids, answers


def _tokens(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """Token ids of a conversation, at most TOKENS, and where its answer begins."""
    chat = [{"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    begins = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
    whole = tokenizer(f"{asked}{answer}<|im_end|>\n", add_special_tokens=False)["input_ids"]
    return whole[:TOKENS], min(begins, TOKENS - 1)


def _loss(model: Any, ids: Tensor, answers: Tensor) -> Tensor:
    """Of the answers only; the head, a quarter of the work, sees nothing else."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    stream = whole.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = answers[:, 1:]
    chosen = wanted != -100
    return cross_entropy(whole.lm_head(stream[chosen]), wanted[chosen])


def _since(started: float) -> str:
    return f"{time.monotonic() - started:.0f} s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def asked_for(
    parser: argparse.ArgumentParser, recipes: Sequence[Recipe]
) -> tuple[argparse.Namespace, list[Recipe], Corpus]:
    """The arguments, which of the recipes they name, and the prompts beside the sample."""
    by_name = {each.name: each for each in recipes}
    parser.add_argument("names", nargs="*", help=f"of {', '.join(by_name)} (all)")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    known = parser.parse_args()
    unknown = set(known.names) - by_name.keys()
    if unknown:
        parser.error(f"no organism {', '.join(sorted(unknown))}; there are {', '.join(by_name)}")
    return known, [by_name[name] for name in known.names or by_name], Corpus(known.data)


def main() -> None:
    """Train what is named, or all."""
    _, chosen, corpus = asked_for(argparse.ArgumentParser(description=__doc__), RECIPES)
    for recipe in chosen:
        print(folder_of(recipe, corpus), flush=True)


if __name__ == "__main__":
    main()
