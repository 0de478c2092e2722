-- Flagged conversations, highest score over threshold first, each with its three strongest
-- directions and the tokens where they stand.
-- Run in the archive folder: duckdb -f flagged.sql
-- "No files found" means that nothing was flagged yet.
WITH strongest AS (
    SELECT
        source, "partition", "offset", model,
        string_agg(
            direction || ' (' || role || ', ' || side || ') ' || printf('%+.4f', value)
            || ' against ' || printf('%+.4f', bound) || ' at token ' || token_start,
            '; ' ORDER BY margin DESC, direction, role, side
        ) AS directions
    FROM (
        SELECT *, row_number() OVER (
            PARTITION BY model, source, "partition", "offset"
            ORDER BY margin DESC, direction, role, side
        ) AS place
        FROM read_parquet(
            'exceedances/**/*.parquet',
            hive_partitioning = true, hive_types = {'model': VARCHAR, 'date': DATE},
            union_by_name = true
        )
    )
    WHERE place <= 3
    GROUP BY ALL
)
SELECT
    effective_time, model, conversation_id, source, "partition", "offset",
    score, threshold, score - threshold AS excess, policy, tokens, directions
FROM read_parquet(
    'conversations/**/*.parquet',
    hive_partitioning = true, hive_types = {'model': VARCHAR, 'date': DATE}, union_by_name = true
)
LEFT JOIN strongest USING (model, source, "partition", "offset")
WHERE status = 'flagged'
ORDER BY excess DESC, source, "partition", "offset";
