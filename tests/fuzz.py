"""Mutated real records through decode: every one comes out once, none stops the job.

`make fuzz` runs 100,000 of them and prints what became of them and one JSON object.
"""

import argparse
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from apache_beam.pvalue import TaggedOutput
from cheap_job import MAX_TOKENS, MODEL, CheapEngine

from pipeline.demo import assets
from schemas.records import DeadLetter, Decoded, Header, LogRecord, Position, Skipped, Tokenized
from transforms.decode import Routes, _decoded
from transforms.tokenize import _TokenizeAhead

ODD: Sequence[Any] = (
    *(None, True, 0, -1, 1e308, 2**70, "", " ", "\ud800", "\u0000", "user", "\u202eabc", [], {}),
    *([[]], {"": None}, ["x"] * 3, {"type": "text", "text": 1}, "x" * 5000),
)
ROUTES = Routes({}, MODEL)
SAMPLES = 300
AT_ONCE = 1000


def mutated(records: Sequence[bytes], count: int, chance: random.Random) -> Iterator[bytes]:
    """Real records, each changed by one to four mutations in a row."""
    for _ in range(count):
        value = chance.choice(records)
        for _ in range(chance.randint(1, 4)):
            value = chance.choice(MUTATIONS)(value, records, chance)
        yield value


def _flipped(value: bytes, _: Sequence[bytes], chance: random.Random) -> bytes:
    changed = bytearray(value or b"x")
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _cut(value: bytes, _: Sequence[bytes], chance: random.Random) -> bytes:
    start, end = sorted(chance.randint(0, len(value)) for _ in range(2))
    return chance.choice((value[:end], value[start:], value[:start] + value[end:]))


def _spliced(value: bytes, records: Sequence[bytes], chance: random.Random) -> bytes:
    other = chance.choice(records)
    return value[: chance.randint(0, len(value))] + other[chance.randint(0, len(other)) :]


def _repeated(value: bytes, _: Sequence[bytes], chance: random.Random) -> bytes:
    start, end = sorted(chance.randint(0, len(value)) for _ in range(2))
    return value[:end] + value[start:end] * chance.randint(1, 3) + value[end:]


def _nested(value: bytes, _: Sequence[bytes], chance: random.Random) -> bytes:
    depth = chance.choice((10, 500, 3000))
    return b'{"messages":[' * depth + value + b"]}" * depth


def _restructured(value: bytes, _: Sequence[bytes], chance: random.Random) -> bytes:
    """A place in the JSON that holds something else, or nothing."""
    try:
        record = json.loads(value)
        places = list(_places(record))
        if places:
            container, key = chance.choice(places)
            _change(container, key, chance)
        return json.dumps(record).encode()
    except (ValueError, RecursionError):
        return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _change(container: Any, key: Any, chance: random.Random) -> None:
    if chance.random() < 0.3:
        del container[key]
    elif isinstance(container, dict) and chance.random() < 0.3:
        container[chance.choice(("messages", "role", "content", "id", "x"))] = container.pop(key)
    else:
        container[key] = chance.choice(ODD)


Mutation = Callable[[bytes, Sequence[bytes], random.Random], bytes]
MUTATIONS: Sequence[Mutation] = (
    *(_flipped, _cut, _spliced, _repeated, _nested, _restructured, _restructured, _restructured),
)


def decoded(base: Path, values: Iterator[bytes]) -> Counter[str]:
    """What became of the values; fails where one comes out twice or not at all."""
    found = Counter[str]()
    records = (LogRecord(_header(number), value, None) for number, value in enumerate(values))
    while some := list(itertools.islice(records, AT_ONCE)):
        decoded = [out for record in some for out in _decoded(record, ROUTES)]
        conversations = [out for out in decoded if isinstance(out, Decoded)]
        letters = [out.value for out in decoded if isinstance(out, TaggedOutput)]
        outs = [*letters, *_tokenized(base, conversations)]
        positions = sorted(out.header.position for out in outs)
        assert positions == [record.header.position for record in some]
        found.update(map(_outcome, outs))
    return found


def _tokenized(base: Path, conversations: Sequence[Decoded]) -> Iterator[Tokenized | DeadLetter]:
    step = _TokenizeAhead({MODEL: CheapEngine(base)}, MAX_TOKENS, MAX_TOKENS)
    step.setup()
    step.start_bundle()
    for each in conversations:
        step.process(each)
    for output in step.finish_bundle():
        if isinstance(output, TaggedOutput):
            yield output.value.value
        else:
            yield from output.value


def _header(number: int) -> Header:
    return Header(Position("fuzz", 0, number), None, None, 0, False)


def _outcome(out: Tokenized | DeadLetter | Skipped) -> str:
    if isinstance(out, Tokenized):
        assert len(out.token_ids) == len(out.roles) <= MAX_TOKENS
        return "tokenized"
    return str(out.reason)


def run(base: Path, count: int, seed: int) -> Counter[str]:
    """Mutate and decode `count` records."""
    records = [json.dumps(_short(each)).encode() for each in assets.sharegpt(0, SAMPLES)]
    chats = [json.dumps(_as_chat(json.loads(each))).encode() for each in records]
    return decoded(base, mutated(records + chats, count, random.Random(seed)))


def _short(record: dict[str, Any]) -> dict[str, Any]:
    turns = [{**turn, "value": turn["value"][:400]} for turn in record["conversations"][:4]]
    return {**record, "conversations": turns}


def _as_chat(record: dict[str, Any]) -> dict[str, Any]:
    roles = {"human": "user", "gpt": "assistant"}
    turns = record["conversations"]
    messages = [{"role": roles.get(t["from"], t["from"]), "content": t["value"]} for t in turns]
    return {"id": record["id"], "messages": messages}


def main() -> None:
    """Run, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    known = parser.parse_args()
    found = run(assets.base_model(Path("build/models/base")), known.records, known.seed)
    for outcome, count in found.most_common():
        print(f"{outcome:<20} {count:>8,}")
    print(json.dumps({"in": known.records, "out": found.total(), "crashes": 0}))


if __name__ == "__main__":
    main()
