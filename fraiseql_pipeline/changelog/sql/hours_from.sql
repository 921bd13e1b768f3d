-- The hours from an instant on that have events, oldest first: of a clock's future nearly always none, one look at the index on created_at.
-- {at}: created_at as the contract means it.
SELECT DISTINCT date_trunc('hour', {at}, 'UTC') AS hour
  FROM core.tb_entity_change_log
 WHERE created_at >= %(start)s::timestamptz AND created_at < '9999-12-31 00:00:00+00'::timestamptz
 ORDER BY hour LIMIT %(most)s
