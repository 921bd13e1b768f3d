-- Rows that belong to no window: times no window can have. Two ranges of the index on created_at, and its nulls.
SELECT count(*) FROM core.tb_entity_change_log
 WHERE created_at >= '9999-12-31 00:00:00+00'::timestamptz OR created_at < '0001-01-01 00:00:00+00'::timestamptz OR created_at IS NULL
