-- As settle_point.sql, with the value the pk sequence has reached. A visible pk was drawn before this statement's snapshot, so it can be
-- larger than the sequence only if a producer chose it.
SELECT coalesce((SELECT max(pk_entity_change_log) FROM core.tb_entity_change_log), 0)::bigint AS newest, clock_timestamp() AS at,
       (SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM {sequence}) AS drawn
