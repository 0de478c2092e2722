-- Counts per epoch: clean, flagged, not calibrated, late and truncated conversations.
-- "uncalibrated" is not "clean": those conversations were scored but could not be judged.
-- Run in the archive folder: duckdb -f status_per_epoch.sql
SELECT
    model, epoch,
    min(effective_time) AS first_seen,
    count(*) AS conversations,
    count(*) FILTER (status = 'clean') AS clean,
    count(*) FILTER (status = 'flagged') AS flagged,
    count(*) FILTER (status = 'uncalibrated') AS uncalibrated,
    count(*) FILTER (late) AS late,
    count(*) FILTER (truncated) AS truncated,
    count(*) FILTER (status = 'flagged')
        / nullif(count(*) FILTER (status <> 'uncalibrated'), 0) AS flagged_rate
FROM read_parquet(
    'conversations/**/*.parquet',
    hive_partitioning = true, hive_types = {'model': VARCHAR, 'date': DATE}, union_by_name = true
)
GROUP BY model, epoch
ORDER BY model, epoch;
