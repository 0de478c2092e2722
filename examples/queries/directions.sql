-- Which directions fire most: in how many flagged conversations, how far, on whose tokens.
-- Run in the archive folder: duckdb -f directions.sql
-- "No files found" means that nothing was flagged yet.
SELECT
    model, direction, layer, kind, rank_index, role, side,
    count(*) AS conversations,
    max(margin) AS largest_margin,
    median(margin) AS median_margin,
    min(effective_time) AS first_seen,
    max(effective_time) AS last_seen
FROM read_parquet(
    'exceedances/**/*.parquet',
    hive_partitioning = true, hive_types = {'model': VARCHAR, 'date': DATE}, union_by_name = true
)
GROUP BY ALL
ORDER BY model, conversations DESC, largest_margin DESC, direction, role, side;
