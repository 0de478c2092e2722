-- Directions that fire together: pairs exceeded in the same conversation, most frequent first.
-- A planted behaviour moves a dozen directions at once; chance does not.
-- Run in the archive folder: duckdb -f together.sql
-- "No files found" means that nothing was flagged yet.
WITH fired AS (
    SELECT DISTINCT model, source, "partition", "offset", role, direction
    FROM read_parquet(
        'exceedances/**/*.parquet',
        hive_partitioning = true, hive_types = {'model': VARCHAR, 'date': DATE},
        union_by_name = true
    )
)
SELECT model, role, one.direction, other.direction AS with_direction, count(*) AS conversations
FROM fired AS one
JOIN fired AS other USING (model, source, "partition", "offset", role)
WHERE one.direction < other.direction
GROUP BY ALL
ORDER BY model, conversations DESC, role, one.direction, with_direction
LIMIT 100;
