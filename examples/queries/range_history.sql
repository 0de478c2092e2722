-- How ranges moved: the twenty series whose extreme widened most, epoch by epoch.
-- A range that keeps widening in one direction is drift, or somebody who trains it slowly.
-- Run in the archive folder: duckdb -f range_history.sql
WITH history AS (
    SELECT *, CASE side WHEN 'high' THEN extreme ELSE -extreme END AS reach
    FROM read_parquet(
        'ranges/**/*.parquet',
        hive_partitioning = true, hive_types = {'model': VARCHAR, 'date': DATE},
        union_by_name = true
    )
),
moved AS (
    SELECT
        model, direction, role, side,
        arg_max(reach, epoch) - arg_min(reach, epoch) AS widened
    FROM history
    WHERE n > 0
    GROUP BY model, direction, role, side
    QUALIFY row_number() OVER (
        PARTITION BY model ORDER BY widened DESC, direction, role, side
    ) <= 20
)
SELECT
    model, direction, role, side, widened, epoch, effective_time, n, p50, p90, p99, p999, extreme,
    reach - lag(reach) OVER (PARTITION BY model, direction, role, side ORDER BY epoch) AS step
FROM history
JOIN moved USING (model, direction, role, side)
ORDER BY model, widened DESC, direction, role, side, epoch;
