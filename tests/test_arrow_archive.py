import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from extremes import whole
from hypothesis import given
from hypothesis import strategies as st
from sample_verdicts import (
    DIRECTIONS_HASH,
    EPOCH_MS,
    sample_directions,
    sample_pack,
    sample_segments,
)

import transforms.archive.files as files
import transforms.archive.segments as archived
from schemas.arrow import (
    CONVERSATIONS,
    EXCEEDANCES,
    QUANTILES,
    RANGES,
    SEGMENT_COLUMNS,
    conversations_schema,
    exceedances_schema,
    ranges_schema,
)
from schemas.records import ABSENT, Position, Segments, VerdictPack
from transforms.archive.files import NO_DATE, merge, write_table
from transforms.archive.rows import conversations_table, exceedances_table, ranges_table
from transforms.archive.segments import read_segments, segments_of

D = 6
DIRECTIONS = sample_directions(D)
MIDNIGHT = 1_700_006_400_000
"""2023-11-15 00:00 UTC, in the middle of an epoch here."""
FITTED = {
    "policy": "budget/3",
    "settings": "{}",
    "bound": 0.25,
    "known": True,
    "threshold": None,
    "handicap": 0.5,
    "window": 0.125,
}
"""What a policy makes of ranges, the same for all series here."""
QUERIES = sorted((Path(__file__).parent.parent / "examples/queries").glob("*.sql"))


def packs(seed: int, offsets: range, partitions: int = 3) -> list[VerdictPack]:
    """A slice: packs of several partitions, their rows in no order, around midnight."""
    rng = np.random.default_rng(seed)
    places = [Position("kafka://c/t", p, o) for p, o in product(range(partitions), offsets)]
    shuffled = [places[i] for i in rng.permutation(len(places))]
    times = [MIDNIGHT - 60_000 + place.offset * 3000 for place in shuffled]
    half = len(shuffled) // 2
    return [
        sample_pack(shuffled[:half], times[:half], D, seed),
        sample_pack(shuffled[half:], times[half:], D, seed + 1),
    ]


def cos32(steps: int | None) -> float | None:
    """The float32 next to a number of steps, as a Python float."""
    return None if steps is None else float(np.float32(steps / 32767))


def moment(ms: int | None) -> datetime | None:
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC)


def expected_conversations(found: list[VerdictPack]) -> list[tuple[Any, ...]]:
    """Rows of `conversations`, value by value from the records."""
    rows = []
    for pack in found:
        extremes = whole(pack.scored.segments)
        for i, (row, judgement) in enumerate(zip(pack.scored.rows, pack.judgements, strict=True)):
            header = row.header
            rows.append((
                row.conversation_id, header.position.source, header.position.partition,
                header.position.offset, moment(header.event_time), moment(header.effective_time),
                header.late, header.epoch, row.tokens, row.truncated, str(judgement.status),
                cos32(judgement.score), cos32(judgement.threshold), pack.policy, pack.ranges_hash,
                DIRECTIONS_HASH, extremes.low[i].tolist(), extremes.high[i].tolist(),
                *segment_lists(pack.scored.segments, i),
                None if judgement.role is None else ("user", "assistant")[judgement.role],
            ))  # fmt: skip
    return sorted(rows, key=lambda row: row[1:4])


def segment_lists(segments: Segments, row: int) -> list[list[int]]:
    """What stands in a conversation's segment columns, number by number."""
    names = [name.removeprefix("segment_") for name in SEGMENT_COLUMNS]
    lists: list[list[int]] = [[] for _ in names]
    for place, of in enumerate(segments.row):
        if of == row:
            for found, name in zip(lists, names, strict=True):
                found += np.atleast_1d(getattr(segments, name)[place]).tolist()
    return lists


def expected_exceedances(found: list[VerdictPack]) -> list[tuple[Any, ...]]:
    rows = []
    for pack in found:
        for i, judgement in enumerate(pack.judgements):
            for e in judgement.exceedances:
                row, direction = pack.scored.rows[i], DIRECTIONS[e.direction]
                rows.append((
                    row.conversation_id, row.header.position.source,
                    row.header.position.partition, row.header.position.offset,
                    moment(row.header.effective_time), row.header.epoch, direction.name,
                    direction.layer, direction.kind, direction.index,
                    "assistant" if e.role else "user", str(e.side), cos32(e.value),
                    cos32(e.bound), cos32(e.margin), e.token, e.token + 1, None,
                ))  # fmt: skip
    return sorted(rows, key=lambda row: (*row[1:4], -row[14]))


def sample_ranges(epoch: int, start: int | None, counts: np.ndarray | None = None) -> pa.Table:
    rng = np.random.default_rng(epoch)
    quantiles = {name: np.arange(4 * D) * 10 + 100 * place for place, name in enumerate(QUANTILES)}
    counts = rng.integers(1, 99, 4 * D) if counts is None else counts
    extremes = np.arange(4 * D) * 10 + 500 + epoch
    fitted = {name: [value] * 4 * D for name, value in FITTED.items()}
    return ranges_table(
        epoch, start, f"{epoch:064x}", counts, extremes, quantiles, fitted, DIRECTIONS,
        DIRECTIONS_HASH,
    )  # fmt: skip


def query(archive: Path, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(f"SET file_search_path = '{archive}'")
        return connection.execute(sql).fetchall()


def read_all(archive: Path, table: str) -> str:
    return (
        f"read_parquet('{table}/**/*.parquet', hive_partitioning = true, "
        "hive_types = {'model': VARCHAR, 'date': DATE})"
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def slices() -> list[list[VerdictPack]]:
    """Three slices of one epoch."""
    return [packs(10 * i, range(20 * i, 20 * i + 20)) for i in range(3)]


def pend(folder: Path, slices: list[list[VerdictPack]]) -> dict[str, list[Path]]:
    """Pending files of slices, by table."""
    pending: dict[str, list[Path]] = {CONVERSATIONS: [], EXCEEDANCES: []}
    for number, part in enumerate(slices):
        for table, make in (
            (CONVERSATIONS, conversations_table),
            (EXCEEDANCES, exceedances_table),
        ):
            path = folder / f"{table}-{number}.parquet"
            write_table(make(part, DIRECTIONS, DIRECTIONS_HASH), path)
            pending[table].append(path)
    return pending


@pytest.fixture
def archive(tmp_path: Path, slices: list[list[VerdictPack]]) -> Path:
    """An archive of one epoch of conversations and three of ranges."""
    root = tmp_path / "archive"
    for table, paths in pend(tmp_path / "pending", slices).items():
        merge(paths, root, table, "badnet", "epoch-7")
    for epoch in range(3):
        path = tmp_path / f"pending/ranges-{epoch}.parquet"
        write_table(sample_ranges(epoch, MIDNIGHT + epoch * EPOCH_MS), path)
        merge([path], root, RANGES, "badnet", f"epoch-{epoch}")
    return root


def test_duckdb_reads_every_conversation_as_it_was_judged(
    archive: Path, slices: list[list[VerdictPack]]
) -> None:
    rows = query(
        archive,
        f'SELECT * EXCLUDE (model, "date") FROM {read_all(archive, CONVERSATIONS)} '
        'ORDER BY source, "partition", "offset"',
    )
    assert rows == expected_conversations([pack for part in slices for pack in part])


def test_the_sample_holds_conversations_of_all_kinds(slices: list[list[VerdictPack]]) -> None:
    rows = conversations_table(slices[0], DIRECTIONS, DIRECTIONS_HASH).to_pylist()
    present = {tuple(row["high"][role * D] != ABSENT for role in (0, 1)) for row in rows}
    assert present == {(False, False), (False, True), (True, False), (True, True)}
    numbers = [len(row["segment_role"]) for row in rows]
    assert min(numbers) == 0 and max(numbers) > 5
    assert all(sum(row["segment_tokens"]) == row["tokens"] for row in rows)


def test_duckdb_reads_every_exceedance_with_its_place(
    archive: Path, slices: list[list[VerdictPack]]
) -> None:
    rows = query(
        archive,
        f'SELECT * EXCLUDE (model, "date") FROM {read_all(archive, EXCEEDANCES)} '
        'ORDER BY source, "partition", "offset", margin DESC',
    )
    assert rows == expected_exceedances([pack for part in slices for pack in part])
    assert rows


def test_steps_are_recovered_exactly_from_cosines() -> None:
    steps = np.arange(-65534, 65535)
    cosines = np.array([cos32(int(step)) for step in steps], np.float32)
    assert np.array_equal(np.rint(cosines * np.float32(32767)).astype(int), steps)


def test_files_lie_under_model_and_day_of_their_rows(archive: Path) -> None:
    found = query(
        archive,
        "SELECT DISTINCT filename, model, \"date\", strftime(effective_time, '%Y-%m-%d') "
        "FROM read_parquet('conversations/**/*.parquet', hive_partitioning = true, "
        "filename = true) ORDER BY ALL",
    )
    days = ["2023-11-14", "2023-11-15"]
    assert [row[1:] for row in found] == [("badnet", date.fromisoformat(day), day) for day in days]
    assert [str(Path(row[0]).relative_to(archive)) for row in found] == [
        f"conversations/model=badnet/date={day}/epoch-7.parquet" for day in days
    ]


def test_rows_of_a_file_are_in_the_order_of_their_positions(archive: Path) -> None:
    for path in archive.rglob("epoch-7.parquet"):
        rows = pq.ParquetFile(path).read(["source", "partition", "offset"]).to_pylist()
        places = [(row["source"], row["partition"], row["offset"]) for row in rows]
        assert places == sorted(places)


def test_the_footer_says_what_made_the_file(archive: Path) -> None:
    paths = list(archive.rglob("*.parquet"))
    assert {path.relative_to(archive).parts[0] for path in paths} == {
        CONVERSATIONS,
        EXCEEDANCES,
        RANGES,
    }
    for path in paths:
        pairs = query(archive, f"SELECT key, value FROM parquet_kv_metadata('{path}')")
        footer = {bytes(key).decode(): bytes(value).decode() for key, value in pairs}
        assert footer["deltawatch.schema_version"] == "3"
        assert footer["deltawatch.tool_version"] == "0.1.0"
        assert footer["deltawatch.directions_hash"] == DIRECTIONS_HASH
        assert json.loads(footer["deltawatch.directions"]) == [d.name for d in DIRECTIONS]


def test_files_keep_the_schemas_and_the_encoding(archive: Path) -> None:
    schemas = {
        CONVERSATIONS: conversations_schema(D),
        EXCEEDANCES: exceedances_schema(),
        RANGES: ranges_schema(),
    }
    for path in archive.rglob("*.parquet"):
        assert pq.read_schema(path).equals(schemas[path.relative_to(archive).parts[0]])
    path = next((archive / CONVERSATIONS).rglob("*.parquet"))
    group = pq.read_metadata(path).row_group(0)
    columns = {
        column.path_in_schema: column for column in map(group.column, range(group.num_columns))
    }
    cosines = ("low", "high", "segment_low", "segment_high")
    for column in (columns[f"{name}.list.element"] for name in cosines):
        assert column.compression == "ZSTD"
        assert "BYTE_STREAM_SPLIT" in column.encodings
        assert not any("DICTIONARY" in encoding for encoding in column.encodings)
    for name in ("segment_role", "segment_tokens", "segment_low_at"):
        assert "BYTE_STREAM_SPLIT" not in columns[f"{name}.list.element"].encodings


def test_merging_again_in_any_order_changes_nothing(
    tmp_path: Path, slices: list[list[VerdictPack]]
) -> None:
    pending, root = pend(tmp_path / "pending", slices), tmp_path / "archive"
    for table, paths in pending.items():
        written = merge(paths, root, table, "m", "e")
        before = contents(root)
        assert merge(paths[::-1], root, table, "m", "e") == written
        assert contents(root) == before
        assert all(path.exists() for path in (*written, *paths))


def test_how_an_epoch_was_sliced_does_not_show(tmp_path: Path) -> None:
    whole = [packs(4, range(40))]
    rows = sample_rows(whole[0])
    pending = {1: pend(tmp_path / "one", whole), 3: pend(tmp_path / "three", rows)}
    for count, paths in pending.items():
        merge(paths[EXCEEDANCES], tmp_path / f"archive-{count}", EXCEEDANCES, "m", "e")
        merge(paths[CONVERSATIONS], tmp_path / f"archive-{count}", CONVERSATIONS, "m", "e")
    assert contents(tmp_path / "archive-1") == contents(tmp_path / "archive-3")


def sample_rows(whole: list[VerdictPack]) -> list[list[VerdictPack]]:
    """The same rows, each pack cut into three slices."""
    return [
        [_cut(pack, rows) for pack in whole]
        for rows in (slice(0, 7), slice(7, 33), slice(33, None))
    ]


def _cut(pack: VerdictPack, rows: slice) -> VerdictPack:
    indices = list(range(len(pack.scored.rows)))[rows]
    scored = replace(
        pack.scored, rows=pack.scored.rows[rows], segments=pack.scored.segments.take(indices)
    )
    return replace(pack, scored=scored, judgements=pack.judgements[rows])


def test_many_small_row_groups_and_no_cache_give_the_same_rows(
    tmp_path: Path, slices: list[list[VerdictPack]], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = pend(tmp_path / "pending", slices)[CONVERSATIONS]
    (one, _) = merge(paths, tmp_path / "one", CONVERSATIONS, "m", "e")
    monkeypatch.setattr(files, "GROUP_BYTES", 2000)
    monkeypatch.setattr(files, "_CACHE_BYTES", 1)
    (many, _) = merge(paths, tmp_path / "many", CONVERSATIONS, "m", "e")
    assert pq.ParquetFile(one).num_row_groups == 1
    assert pq.ParquetFile(many).num_row_groups > 5
    assert pq.ParquetFile(one).read().equals(pq.ParquetFile(many).read())


def test_what_a_crash_leaves_behind_is_never_read_and_goes_with_the_next_attempt(
    tmp_path: Path, slices: list[list[VerdictPack]], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, root = pend(tmp_path / "pending", slices)[CONVERSATIONS], tmp_path / "archive"
    merge(paths, tmp_path / "calm", CONVERSATIONS, "m", "e")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("os.replace", crash)
        with pytest.raises(KeyboardInterrupt):
            merge(paths, root, CONVERSATIONS, "m", "e")
    assert contents(root)
    assert not list(root.rglob("*.parquet"))
    merge(paths, root, CONVERSATIONS, "m", "e")
    assert contents(root) == contents(tmp_path / "calm")


def test_a_crash_between_two_days_is_healed_by_merging_again(
    tmp_path: Path, slices: list[list[VerdictPack]]
) -> None:
    paths, root = pend(tmp_path / "pending", slices)[CONVERSATIONS], tmp_path / "archive"
    first, second = merge(paths, root, CONVERSATIONS, "m", "e")
    whole = contents(root)
    second.unlink()
    first.write_bytes(first.read_bytes()[:100])
    merge(paths, root, CONVERSATIONS, "m", "e")
    assert contents(root) == whole


def test_a_missing_pending_file_stops_the_merge(
    tmp_path: Path, slices: list[list[VerdictPack]]
) -> None:
    paths, root = pend(tmp_path / "pending", slices)[CONVERSATIONS], tmp_path / "archive"
    merge(paths, root, CONVERSATIONS, "m", "e")
    whole = contents(root)
    paths[1].unlink()
    with pytest.raises(FileNotFoundError):
        merge(paths, root, CONVERSATIONS, "m", "e")
    assert contents(root) == whole


def test_files_of_different_directions_are_not_merged(
    tmp_path: Path, slices: list[list[VerdictPack]]
) -> None:
    for name, directions_hash in (("a", "1" * 64), ("b", "2" * 64)):
        table = conversations_table(slices[0], DIRECTIONS, directions_hash)
        write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match="different directions"):
        merge(sorted(tmp_path.glob("*.parquet")), tmp_path / "x", CONVERSATIONS, "m", "e")


def former(table: pa.Table) -> pa.Table:
    """The table as schema version 1 had it: places of whole conversations, no segments or role."""
    metadata = {**(table.schema.metadata or {}), b"deltawatch.schema_version": b"1"}
    kind = pa.list_(pa.field("element", pa.uint32(), nullable=False), 2 * D)
    places = pa.FixedSizeListArray.from_arrays(
        pa.array(np.arange(2 * D * len(table)), pa.uint32()), type=kind
    )
    table = table.drop_columns([*SEGMENT_COLUMNS, "role"])
    for name in ("low_at", "high_at"):
        table = table.append_column(pa.field(name, kind, nullable=False), places)
    return table.replace_schema_metadata(metadata)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_a_slice_of_the_former_version_is_merged_with_one_of_this(
    tmp_path: Path, slices: list[list[VerdictPack]], names: tuple[str, str]
) -> None:
    old, new = (conversations_table(slices[i], DIRECTIONS, DIRECTIONS_HASH) for i in (0, 1))
    paths = [tmp_path / f"{name}.parquet" for name in names]
    for path, table in zip(paths, (former(old), new), strict=True):
        write_table(table, path)
    written = merge(paths, tmp_path / "archive", CONVERSATIONS, "m", "e")
    for path in written:
        assert pq.read_schema(path).equals(conversations_schema(D))
        assert pq.read_schema(path).metadata[b"deltawatch.schema_version"] == b"3"
    nothing: dict[str, Any] = {"role": None} | {name: [] for name in SEGMENT_COLUMNS}
    expected = [{**row, **nothing} for row in old.to_pylist()] + new.to_pylist()
    found = [row for path in written for row in pq.ParquetFile(path).read().to_pylist()]
    assert sorted(found, key=place) == sorted(expected, key=place)


def test_rows_of_ranges_by_the_former_version_are_merged_with_those_of_this(tmp_path: Path) -> None:
    old, new = sample_ranges(1, MIDNIGHT), sample_ranges(2, MIDNIGHT)
    metadata = {**(old.schema.metadata or {}), b"deltawatch.schema_version": b"2"}
    old = old.drop_columns(list(FITTED)).replace_schema_metadata(metadata)
    paths = [tmp_path / f"{name}.parquet" for name in ("a", "b")]
    for path, table in zip(paths, (new, old), strict=True):
        write_table(table, path)
    (written,) = merge(paths, tmp_path / "archive", RANGES, "m", "e")
    assert pq.read_schema(written).equals(ranges_schema())
    nothing = dict.fromkeys(FITTED)
    expected = [{**row, **nothing} for row in old.to_pylist()] + new.to_pylist()
    assert pq.ParquetFile(written).read().to_pylist() == expected


def place(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["source"], row["partition"], row["offset"]


def test_an_epoch_of_the_former_version_stays_as_it_is(
    tmp_path: Path, slices: list[list[VerdictPack]]
) -> None:
    table = former(conversations_table(slices[0], DIRECTIONS, DIRECTIONS_HASH))
    write_table(table, tmp_path / "a.parquet")
    (path,) = merge([tmp_path / "a.parquet"], tmp_path / "archive", CONVERSATIONS, "m", "e")
    assert pq.ParquetFile(path).read().equals(table)
    assert pq.read_schema(path).metadata == table.schema.metadata


def test_an_empty_slice_makes_no_rows(tmp_path: Path, slices: list[list[VerdictPack]]) -> None:
    pending = pend(tmp_path / "pending", [*slices, []])
    alone = pend(tmp_path / "alone", [[]])
    for table in (CONVERSATIONS, EXCEEDANCES):
        assert merge(alone[table], tmp_path / "none", table, "m", "e") == []
        assert merge([], tmp_path / "none", table, "m", "e") == []
        merge(pending[table], tmp_path / "archive", table, "m", "e")
    ((count,),) = query(
        tmp_path / "archive", f"SELECT count(*) FROM {read_all(tmp_path, CONVERSATIONS)}"
    )
    assert count == 180


def test_rows_without_a_time_have_no_date(tmp_path: Path) -> None:
    positions = [Position("file://log.jsonl?sha256=00", 0, 100 * i) for i in range(9)]
    pending = pend(tmp_path / "pending", [[sample_pack(positions, [None] * 9, D, seed=5)]])
    (path,) = merge(pending[CONVERSATIONS], tmp_path / "archive", CONVERSATIONS, "m", "e")
    assert path.parent.name == f"date={NO_DATE}"
    rows = query(
        tmp_path / "archive",
        f'SELECT DISTINCT "date", effective_time FROM {read_all(tmp_path, CONVERSATIONS)}',
    )
    assert rows == [(None, None)]


@pytest.mark.parametrize(
    "model", ["org/model-7b", "a=b&c", "../../escape", "weiß 模型", "100%", "model.v1_x~y", "7"]
)
def test_any_model_name_is_one_folder_and_reads_back(tmp_path: Path, model: str) -> None:
    path = tmp_path / "ranges.parquet"
    write_table(sample_ranges(1, MIDNIGHT), path)
    (written,) = merge([path], tmp_path / "archive", RANGES, model, "e")
    parts = written.relative_to(tmp_path / "archive").parts
    assert len(parts) == 4 and ".." not in parts
    assert unquote(parts[1]) == f"model={model}"
    rows = query(tmp_path / "archive", f"SELECT DISTINCT model FROM {read_all(tmp_path, RANGES)}")
    assert rows == [(model,)]


def test_ranges_have_the_sign_of_their_side_and_nothing_where_nothing_was_counted() -> None:
    counts = np.arange(4 * D)
    rows = sample_ranges(3, None, counts).to_pylist()
    assert len(rows) == 4 * D
    expected = [
        (side, role, direction.name)
        for side in ("high", "low")
        for role in ("user", "assistant")
        for direction in DIRECTIONS
    ]
    assert [(row["side"], row["role"], row["direction"]) for row in rows] == expected
    for series, row in enumerate(rows):
        sign = 1 if series < 2 * D else -1
        assert row["n"] == series
        values = [row[name] for name in ("extreme", *QUANTILES)]
        steps = [series * 10 + 503, *(series * 10 + 100 * place for place in range(4))]
        wanted = [cos32(sign * step) for step in steps] if series else [None] * 5
        assert values == wanted


# --- segments read back -------------------------------------------------------------------------


def listed(segments: Segments) -> list[list[list[int]]]:
    """Of every conversation what stands in its segment columns."""
    return [segment_lists(segments, row) for row in range(segments.conversations)]


def by_position(found: list[VerdictPack]) -> list[list[list[int]]]:
    """The same of packs, in the order of their positions."""
    pairs = [
        (row.header.position, lists)
        for pack in found
        for row, lists in zip(pack.scored.rows, listed(pack.scored.segments), strict=True)
    ]
    return [lists for _, lists in sorted(pairs, key=lambda pair: pair[0])]


def assert_typed(segments: Segments) -> None:
    made = sample_segments([[0]], D, np.random.default_rng(0))
    for name in ("row", *(name.removeprefix("segment_") for name in SEGMENT_COLUMNS)):
        assert getattr(segments, name).dtype == getattr(made, name).dtype, name


@pytest.mark.parametrize("seed", range(4))
def test_segments_read_back_are_those_that_were_written(seed: int) -> None:
    found = [*packs(seed, range(9)), *packs(100 + seed, range(20, 22), partitions=2)]
    table = conversations_table(found, DIRECTIONS, DIRECTIONS_HASH)
    segments = segments_of(table, D)
    assert listed(segments) == by_position(found)
    assert_typed(segments)


def test_a_part_of_a_table_has_the_segments_of_its_rows() -> None:
    table = conversations_table(packs(7, range(9)), DIRECTIONS, DIRECTIONS_HASH)
    expected = by_position(packs(7, range(9)))
    assert listed(segments_of(table.slice(5, 11), D)) == expected[5:16]
    assert listed(segments_of(table.slice(3, 0), D)) == []
    (batch,) = table.to_batches()
    assert listed(segments_of(batch.slice(20), D)) == expected[20:]
    chunked = pa.concat_tables([table.slice(4, 3), table.slice(0, 2), table.slice(9)])
    assert listed(segments_of(chunked, D)) == [*expected[4:7], *expected[:2], *expected[9:]]


def test_conversations_without_segments_read_back_without() -> None:
    (pack, _) = packs(1, range(4))
    silent = [i for i, row in enumerate(pack.scored.rows) if row.tokens == 0]
    assert silent
    rows = tuple(pack.scored.rows[i] for i in silent)
    scored = replace(pack.scored, rows=rows, segments=pack.scored.segments.take(silent))
    alone = replace(pack, scored=scored, judgements=tuple(pack.judgements[i] for i in silent))
    for found, count in (([], 0), ([alone], len(silent))):
        segments = segments_of(conversations_table(found, DIRECTIONS, DIRECTIONS_HASH), D)
        assert (segments.conversations, len(segments.row)) == (count, 0)
        assert segments.high.shape == segments.low_at.shape == (0, D)
        assert_typed(segments)


@given(
    st.lists(st.lists(st.integers(0, 1), max_size=150), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_any_segments_read_back(roles: list[list[int]], seed: int) -> None:
    segments = sample_segments(roles, D, np.random.default_rng(seed))
    pack = sample_pack([Position("s", 0, row) for row in range(len(roles))], [0] * len(roles), D, 1)
    changed = replace(pack, scored=replace(pack.scored, segments=segments))
    table = conversations_table([changed], DIRECTIONS, DIRECTIONS_HASH)
    assert listed(segments_of(table, D)) == listed(segments)


@pytest.mark.parametrize("rows_at_once", [1, 7, 1024])
def test_segments_of_an_archive_are_numbered_by_position(
    archive: Path,
    slices: list[list[VerdictPack]],
    rows_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archived, "_ROWS_AT_ONCE", rows_at_once)
    days = sorted((archive / CONVERSATIONS).rglob("*.parquet"))
    assert len(days) == 2
    expected = by_position([pack for part in slices for pack in part])
    for paths in (days, days[::-1]):
        parts = list(read_segments(paths, D))
        assert max(segments.conversations for _, segments in parts) <= rows_at_once
        assert numbered(parts) == dict(enumerate(expected))
        # Partitions lie on both days, so neither file has the first numbers only.
        assert [number for numbers, _ in parts for number in numbers] != list(range(len(expected)))


def test_numbers_go_by_source_then_partition_then_offset(tmp_path: Path) -> None:
    places = [
        Position(source, partition, offset)
        for source in ("file://b", "file://B", "file://ä", "file://a")
        for partition in (10, 2)
        for offset in (100, 30, 2**40)
    ]
    found = [sample_pack(places[start::3], [0] * 8, D, seed=start) for start in range(3)]
    paths = [tmp_path / f"{number}.parquet" for number in range(3)]
    for path, pack in zip(paths, found, strict=True):
        write_table(conversations_table([pack], DIRECTIONS, DIRECTIONS_HASH), path)
    assert numbered(read_segments(paths, D)) == dict(enumerate(by_position(found)))


def numbered(
    parts: Iterable[tuple[np.ndarray, Segments]],
) -> dict[int, list[list[int]]]:
    """By number what stands in the segment columns; every number once."""
    found: dict[int, list[list[int]]] = {}
    for numbers, segments in parts:
        for number, lists in zip(numbers.tolist(), listed(segments), strict=True):
            assert number not in found
            found[number] = lists
    return found


def test_excerpts_stand_where_they_were_asked_for(slices: list[list[VerdictPack]]) -> None:
    table = exceedances_table(
        slices[0], DIRECTIONS, DIRECTIONS_HASH, lambda ids, token: f"{ids[token]}\ud800"
    )
    ids = {row.header.position: row.token_ids for pack in slices[0] for row in pack.scored.rows}
    for row in table.to_pylist():
        token_ids = ids[Position(row["source"], row["partition"], row["offset"])]
        assert token_ids is not None
        assert row["excerpt"] == f"{token_ids[row['token_start']]}?"


@given(st.text(st.characters()) | st.just("\ud800"), st.text(st.characters()))
def test_any_text_can_be_archived(conversation_id: str, source: str) -> None:
    pack = sample_pack([Position(source, 0, 0)], [0], D, seed=1)
    row = replace(pack.scored.rows[0], conversation_id=conversation_id)
    strange = replace(pack, scored=replace(pack.scored, rows=(row,)))
    (value,) = conversations_table([strange], DIRECTIONS, DIRECTIONS_HASH).to_pylist()
    assert value["conversation_id"] == conversation_id.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("path", QUERIES, ids=lambda path: path.stem)
def test_every_ready_query_runs(archive: Path, path: Path) -> None:
    assert query(archive, path.read_text())


def ready(name: str) -> str:
    return next(path for path in QUERIES if path.stem == name).read_text()


def flat(slices: list[list[VerdictPack]]) -> Iterator[tuple[Any, Any]]:
    for part in slices:
        for pack in part:
            yield from zip(pack.scored.rows, pack.judgements, strict=True)


def test_the_flagged_query_lists_every_flagged_conversation_with_its_strongest_first(
    archive: Path, slices: list[list[VerdictPack]]
) -> None:
    rows = query(archive, ready("flagged"))
    expected = {
        row.header.position: [DIRECTIONS[e.direction].name for e in judgement.exceedances[:3]]
        for row, judgement in flat(slices)
        if judgement.status == "flagged"
    }
    found = {
        Position(*row[3:6]): re.findall(r"(\w+) \((?:user|assistant)", row[-1]) for row in rows
    }
    assert found == expected
    excess = [row[8] for row in rows]
    assert excess == sorted(excess, reverse=True)


def test_the_directions_query_counts_every_exceedance(
    archive: Path, slices: list[list[VerdictPack]]
) -> None:
    rows = query(archive, ready("directions"))
    assert sum(row[7] for row in rows) == sum(len(j.exceedances) for _, j in flat(slices))
    assert [row[7] for row in rows] == sorted((row[7] for row in rows), reverse=True)


def test_the_status_query_adds_up(archive: Path, slices: list[list[VerdictPack]]) -> None:
    found = list(flat(slices))
    totals = [sum(column) for column in zip(*query(archive, ready("status_per_epoch")), strict=True)
              if not isinstance(column[0], str | datetime)][1:7]  # fmt: skip
    statuses = [judgement.status for _, judgement in found]
    assert totals == [
        len(found), statuses.count("clean"), statuses.count("flagged"),
        statuses.count("uncalibrated"), sum(row.header.late for row, _ in found),
        sum(row.truncated for row, _ in found),
    ]  # fmt: skip


def test_the_range_query_follows_each_series_over_epochs(archive: Path) -> None:
    rows = query(archive, ready("range_history"))
    assert len(rows) == 20 * 3
    for start in range(0, len(rows), 3):
        series = rows[start : start + 3]
        assert [row[5] for row in series] == [0, 1, 2]
        assert series[0][-1] is None
        assert [row[-1] for row in series[1:]] == pytest.approx([1 / 32767] * 2, abs=1e-7)
        assert series[0][4] == pytest.approx(2 / 32767, abs=1e-7)
